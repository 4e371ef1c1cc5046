#!/usr/bin/env bash
# A real SLURM cluster on one machine, for tests and for trying the sbatch scripts.
# It needs Debian or Ubuntu and root, but neither systemd nor cgroups.
#
#   local_cluster.sh install         install the packages; no service is started by that
#   local_cluster.sh start [NODES]   bring up an empty cluster of NODES nodes (default 2), named n1, n2, ...
#   local_cluster.sh status          print nodes and queue; the exit code is 0 only if every node is usable
#   local_cluster.sh stop            kill every process of the cluster, its jobs included
#   local_cluster.sh env             print what lets sbatch find the cluster: eval "$(local_cluster.sh env)"
#   local_cluster.sh crash NODE      cut its power: its slurmd and all that runs there end at once
#   local_cluster.sh kill-slurmd NODE  only its slurmd ends; what runs there goes on
#   local_cluster.sh revive NODE     start its slurmd again
#   local_cluster.sh restart-controller
#
# Every subcommand may be repeated. `start` keeps a healthy cluster of that size; otherwise it clears away what an
# earlier one left behind, its job history included, and begins anew. Logs stay in LOCAL_SLURM_DIR/log until then.
#
# Partitions: `main` (the default) and `preemptible`, whose jobs are requeued when a job in `main` needs their place.
# Every node claims 8 CPUs, 64 GB and 8 GPUs, whatever the machine has, so a job sees the variables of such a node.
#
# Environment: LOCAL_SLURM_CPUS  what a node claims instead of 8
#              LOCAL_SLURM_DIR   state folder (default ${TMPDIR:-/tmp}/scaleclip-slurm)
#              LOCAL_SLURM_PORT  first of the TCP ports (default 16800): slurmctld, slurmdbd, then one per node
set -euo pipefail

state=$(realpath -m "${LOCAL_SLURM_DIR:-${TMPDIR:-/tmp}/scaleclip-slurm}")
port=${LOCAL_SLURM_PORT:-16800}
cpus=${LOCAL_SLURM_CPUS:-8}
host=$(uname -n)
host=${host%%.*}
hosts_mark="# SLURM cluster in $state"

export SLURM_CONF=$state/etc/slurm.conf
export PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

die() {
  echo "local_cluster.sh: $*" >&2
  exit 1
}

wait_for() { # SECONDS WHAT COMMAND...
  local seconds=$1 what=$2 deadline=$((SECONDS + $1))
  shift 2
  until "$@" >/dev/null 2>&1; do
    ((SECONDS < deadline)) || die "no $what after $seconds s; see $state/log"
    sleep 0.1
  done
}

# A daemon NAME runs in the working folder $state/run/NAME, as do its children that are not a job's: what the kernel
# says of a living process cannot go stale as a pid file does, and holds even when the state folder is gone.
spawn() { # NAME COMMAND...: with a clean environment, because jobs see some of it
  local name=$1
  shift
  mkdir -p "$state/run/$name"
  (
    cd "$state/run/$name"
    exec env -i PATH="$PATH" HOME=/root LANG=C.UTF-8 SLURM_CONF="$SLURM_CONF" MYSQL_UNIX_PORT="$state/sql.socket" \
      setsid "$@" >>"$state/log/$name.log" 2>&1 </dev/null
  ) &
}

pids() {
  # Processes that end while we look are no failure.
  find /proc/[0-9]*/cwd -maxdepth 0 -lname "$state/run/*" 2>/dev/null | cut -d/ -f3 || true
  # A job's processes, by two variables that slurmd gives them.
  grep -lszxF -- "SLURM_CONF=$SLURM_CONF" /proc/[0-9]*/environ |
    xargs -r grep -lsz '^SLURMD_NODENAME=' | cut -d/ -f3 || true
}

pids_of() { # NODE
  find /proc/[0-9]*/cwd -maxdepth 0 -lname "$state/run/$1" 2>/dev/null | cut -d/ -f3 || true
  grep -lszxF -- "SLURM_CONF=$SLURM_CONF" /proc/[0-9]*/environ | xargs -r grep -lszx "SLURMD_NODENAME=$1" | cut -d/ -f3 || true
}

slurmd_of() { # NODE
  find /proc/[0-9]*/cwd -maxdepth 0 -lname "$state/run/$1" 2>/dev/null | cut -d/ -f3 | while read -r pid; do
    [ "$(cat "/proc/$pid/comm")" != slurmd ] || echo "$pid"
  done
}

kill_all() { # COMMAND...: that prints whom
  local deadline=$((SECONDS + 10)) left
  while left=$("$@") && [ -n "$left" ]; do
    ((SECONDS < deadline)) || die "processes that do not die: ${left//$'\n'/ }"
    xargs kill -KILL <<<"$left" 2>/dev/null || true
    sleep 0.1
  done
}

listening() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; } # PORT

write_hosts() { # [NAME...]: make /etc/hosts name these nodes and no others; in place, since containers mount that file
  local others name
  others=$(grep -vF -- "$hosts_mark" /etc/hosts || true)
  {
    printf '%s\n' "$others"
    for name in "$@"; do echo "127.0.0.1 $name $hosts_mark"; done
  } >/etc/hosts
}

write_config() { # NODES
  local nodes=$1 k
  mkdir -p "$state"/{dev,etc,log,run,spool}
  chmod 755 "$state" # munged refuses a socket that others could replace

  for k in {0..7}; do ln -s /dev/null "$state/dev/nvidia$k"; done # the trailing number becomes the GPU's index
  cat >"$state/etc/gres.conf" <<END
AutoDetect=off
NodeName=n[1-$nodes] Name=gpu Type=a100 File=$state/dev/nvidia[0-7]
END

  # slurmdbd accepts its configuration only if nobody else can read it.
  (umask 077 && cat >"$state/etc/slurmdbd.conf") <<END
AuthType=auth/munge
AuthInfo=socket=$state/munge.socket
DbdHost=$host
DbdAddr=127.0.0.1
DbdPort=$((port + 1))
SlurmUser=root
PidFile=$state/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
END

  cat >"$state/etc/slurm.conf" <<END
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmctldPidFile=$state/run/slurmctld.pid
SlurmdPidFile=$state/run/slurmd.%n.pid
SlurmUser=root
StateSaveLocation=$state/spool
SlurmdSpoolDir=$state/spool/%n
# Job ids are the time of the first start, so that those of one cluster are not those of the one before.
FirstJobId=$(date +%-m%d%H%M)

# cred_expire is also the time for which a requeued job waits, 120 s by default.
AuthInfo=socket=$state/munge.socket,cred_expire=5
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((port + 1))
# Towards slurmdbd this, and not AuthInfo, names munge's socket.
AccountingStoragePass=$state/munge.socket
AccountingStorageTRES=gres/gpu

ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU

# Quick rather than frugal: the queue holds a handful of jobs.
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=2
KillWait=5
# a node that does not answer for so long is down; it is used again once it does
SlurmdTimeout=15
ReturnToService=1

# A preempted job first gets the signal of its --signal, and GraceTime later the end.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal

NodeName=DEFAULT CPUs=$cpus RealMemory=64000 Gres=gpu:a100:8
$(for ((k = 1; k <= nodes; k++)); do echo "NodeName=n$k NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1 + k))"; done)
PartitionName=DEFAULT Nodes=ALL DefaultTime=60 MaxTime=INFINITE
PartitionName=main Default=YES PriorityTier=10 PreemptMode=OFF
PartitionName=preemptible PriorityTier=1 GraceTime=10
END
}

usable() { # NODES: exactly so many nodes are there, and all of them take jobs
  local states
  [ -e "$SLURM_CONF" ] && listening "$port" || return 1 # SLURM's commands would try again for up to a minute
  states=$(sinfo --noheader --Node --partition main --format %T) || return 1
  [ "$(wc -l <<<"$states")" = "$1" ] && ! grep -qvxE 'idle|mixed|allocated|completing' <<<"$states"
}

accounting_works() { # slurmctld has made itself known to slurmdbd, which so far holds the port 0
  sacctmgr --noheader --parsable2 list cluster format=controlport | grep -qx "$port"
}

install_packages() {
  local packages=(mariadb-client mariadb-server munge slurm-client slurm-wlm-mysql-plugin slurmctld slurmd slurmdbd)
  local policy=/usr/sbin/policy-rc.d
  local status # of the known ones; dpkg-query fails if it does not know one
  status=$(dpkg-query --show --showformat '${db:Status-Status}\n' "${packages[@]}" 2>/dev/null || true)
  [ "$(grep -cx installed <<<"$status")" != "${#packages[@]}" ] || return 0
  if [ ! -e $policy ]; then # Debian's way to keep apt from starting services
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod +x $policy
  fi
  apt-get update --quiet
  DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes --no-install-recommends "${packages[@]}"
}

start() { # NODES
  local nodes=$1 name k
  [[ $nodes =~ ^[1-9][0-9]?$ ]] || die "NODES=$nodes is not a number from 1 to 99"
  for name in mariadbd munged slurmctld slurmd slurmdbd; do
    command -v $name >/dev/null || die "$name is missing: run '$0 install' first"
  done
  if usable "$nodes"; then return; fi
  [ ! -d "$state" ] || [ -d "$state/run" ] || [ -z "$(ls -A "$state")" ] || die "LOCAL_SLURM_DIR=$state holds other things"

  kill_all pids
  for ((k = port; k < port + 2 + nodes; k++)); do
    ! listening "$k" || die "TCP port $k is taken: set LOCAL_SLURM_PORT to another range"
  done
  rm -rf "$state"
  write_config "$nodes"
  # shellcheck disable=SC2046 # one word a node
  write_hosts $(seq -f n%.0f "$nodes")

  head -c 1024 /dev/urandom | (umask 077 && cat >"$state/etc/munge.key")
  # --force: it warns of folders such as /tmp
  spawn munged munged --foreground --force --key-file="$state/etc/munge.key" --socket="$state/munge.socket" \
    --pid-file="$state/run/munged.pid" --log-file="$state/log/munged.log" --seed-file="$state/run/munged.seed"
  wait_for 10 munged test -S "$state/munge.socket"

  local sql=(--no-defaults --user=root --datadir="$state/run/mariadbd/data" --innodb-log-file-size=8M)
  mkdir -p "$state/run/mariadbd/data"
  mariadb-install-db "${sql[@]}" --skip-test-db >"$state/log/mariadb-install.log" 2>&1
  spawn mariadbd mariadbd "${sql[@]}" --socket="$state/sql.socket" --pid-file="$state/run/mariadbd.pid" --skip-networking
  wait_for 60 mariadbd mariadb --no-defaults --socket="$state/sql.socket" --execute "select 1"

  spawn slurmdbd slurmdbd -D
  wait_for 60 slurmdbd listening $((port + 1))
  wait_for 60 slurmdbd sacctmgr --immediate add cluster local

  spawn slurmctld slurmctld -D
  for name in $(seq -f n%.0f "$nodes"); do spawn "$name" slurmd -D -N "$name"; done
  wait_for 60 "usable nodes" usable "$nodes"
  wait_for 20 accounting accounting_works
}

[ "$(id -u)" = 0 ] || die "must be run by root"
case "${1:-} $#" in
  "install 1") install_packages ;;
  "start 1" | "start 2") start "${2:-2}" ;;
  "status 1")
    [ -e "$SLURM_CONF" ] || die "no cluster in $state"
    sinfo
    squeue
    usable "$(grep -c '^NodeName=n' "$SLURM_CONF")"
    ;;
  "stop 1")
    kill_all pids
    write_hosts
    ;;
  "crash 2") kill_all pids_of "$2" ;;
  "kill-slurmd 2") kill_all slurmd_of "$2" ;;
  "revive 2") [ -n "$(slurmd_of "$2")" ] || spawn "$2" slurmd -D -N "$2" ;;
  "restart-controller 1")
    kill_all pids_of slurmctld
    spawn slurmctld slurmctld -D
    wait_for 30 slurmctld listening "$port"
    ;;
  "env 1") echo "export SLURM_CONF=$SLURM_CONF" ;;
  *)
    sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "$0" >&2
    exit 2
    ;;
esac
