"""Arguments that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, for example configs/demo.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Dotted overrides, for example optim.lr=1e-3.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]
Architecture = Annotated[
    str | None,
    typer.Option(help="What a bare file of weights is: a preset, or open_clip's name, such as ViT-B-32-quickgelu."),
]
Ranks = Annotated[int, typer.Option(min=1, help="Processes to start on this machine; srun and torchrun bring their own.")]
