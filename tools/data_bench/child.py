"""One measurement in a process of its own: python -m data_bench.child JOB.pickle ANSWER.pickle"""

import pickle
import sys
from pathlib import Path

from data_bench.pipelines import measure

if __name__ == "__main__":
    job, made = pickle.loads(Path(sys.argv[1]).read_bytes())
    Path(sys.argv[2]).write_bytes(pickle.dumps(measure(job, made)))
