#!/usr/bin/env bash
# A real Slurm on this machine alone, for tests: no systemd, no cgroups.
#
#   scripts/slurm_cluster.sh start DIR             install if missing, start, wait for idle nodes
#   scripts/slurm_cluster.sh stop DIR              cancel its jobs, stop its own processes
#   scripts/slurm_cluster.sh restart-node DIR n1   kill the node's slurmd, if it runs; start it anew
#   scripts/slurm_cluster.sh installed             exit code 0: Slurm is installed, or can be (root)
#
# Clients need SLURM_CONF=DIR/slurm.conf. Two nodes, n1 and n2, of 2 processors and 2 pretended GPUs
# (character devices; none where mknod is not permitted). The partition `high` preempts (and requeues)
# what runs in `low`. DIR is new or empty, without blanks, of at most 60 characters.
# SLURM_CLUSTER_PORT (default 26817) and the three ports after it must be free.
# SLURM_CLUSTER_ACCOUNTING=1 adds slurmdbd and MariaDB, so that sacct works, and has slurmctld
# forget jobs a minute or two after their end.
set -euo pipefail

PACKAGES=(slurmctld slurmd slurm-client munge)
PORT=${SLURM_CLUSTER_PORT:-26817}
ACCOUNTING=${SLURM_CLUSTER_ACCOUNTING:-0}
[ "$ACCOUNTING" = 0 ] || PACKAGES+=(slurmdbd slurm-wlm-mysql-plugin mariadb-server)
PATH=$PATH:/usr/sbin:/sbin

say() { echo "slurm_cluster: $*" >&2; }
fail() { say "$*"; exit 1; }

missing() {
  local package
  for package in "${PACKAGES[@]}"; do
    dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || echo "$package"
  done
}

install_packages() {
  local packages policy=/usr/sbin/policy-rc.d
  mapfile -t packages < <(missing)
  [ ${#packages[@]} -gt 0 ] || return 0
  [ "$(id -u)" = 0 ] || fail "not root, and these packages are missing: ${packages[*]}"
  say "installing ${packages[*]}"
  if [ ! -e $policy ]; then  # The packages' own daemons must not start.
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod 755 $policy
    trap "rm -f $policy" RETURN
  fi
  local apt=(apt-get -qq -o DPkg::Lock::Timeout=300)
  local install=("${apt[@]}" install -y --no-install-recommends "${packages[@]}")
  export DEBIAN_FRONTEND=noninteractive
  "${install[@]}" >"$DIR/apt.log" 2>&1 </dev/null ||
    { "${apt[@]}" update && "${install[@]}"; } >>"$DIR/apt.log" 2>&1 </dev/null ||
    { tail -n 5 "$DIR/apt.log" >&2; fail "apt-get failed, see $DIR/apt.log"; }
}

# A process is remembered by its number and the time it started, so that no other one is stopped.
started_at() { awk '{sub(/^.*\) /, ""); if ($1 != "Z") print $20}' "/proc/$1/stat" 2>/dev/null; }
daemon() {
  local name=$1
  shift
  setsid "$@" >>"$DIR/log/$name.txt" 2>&1 </dev/null &
  echo "$! $(started_at $!)" >"$DIR/pids/$name"
  disown
}
is_ours() { [ -n "$2" ] && [ "$(started_at "$1")" = "$2" ]; }
stop_daemons() {
  local name pid time _
  for name in "$@"; do
    [ -e "$DIR/pids/$name" ] || continue
    read -r pid time <"$DIR/pids/$name"
    is_ours "$pid" "$time" && kill "$pid" 2>/dev/null
  done
  for name in "$@"; do
    [ -e "$DIR/pids/$name" ] || continue
    read -r pid time <"$DIR/pids/$name"
    for _ in $(seq 100); do
      is_ours "$pid" "$time" || break
      sleep 0.1
    done
    is_ours "$pid" "$time" && kill -KILL "$pid" 2>/dev/null
  done
  return 0
}

eventually() {  # SECONDS COMMAND...
  local deadline=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $deadline ] || { say "waited in vain for: $*"; return 1; }
    sleep 0.1
  done
}
# It ends at once where its port is taken: by a cluster that just ended, for a while.
controller_answers() {
  local pid time
  read -r pid time <"$DIR/pids/slurmctld"
  is_ours "$pid" "$time" || { sleep 1; daemon slurmctld slurmctld -D; }
  scontrol ping
}
two_idle() { [ "$(sinfo -h -N -p low -t idle -o %N | wc -l)" = 2 ]; }

# Twins of /dev/null: Slurm counts character devices, and hands out nothing else.
make_gpus() {
  mkdir "$DIR/dev"
  mknod "$DIR/dev/gpu0" c 1 3 2>/dev/null && mknod "$DIR/dev/gpu1" c 1 3 2>/dev/null
}

configure_accounting() {
  cat >>"$DIR/slurm.conf" <<CONF
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((PORT + 3))
AccountingStoragePass=$DIR/munge/socket
MinJobAge=2
CONF
  cat >"$DIR/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$DIR/munge/socket
DbdHost=$(hostname -s)
DbdAddr=127.0.0.1
DbdPort=$((PORT + 3))
SlurmUser=$(id -un)
PidFile=$DIR/state/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_tests
CONF
  chmod 600 "$DIR/slurmdbd.conf"
}

start_accounting() {
  mkdir "$DIR/mariadb"
  export MYSQL_UNIX_PORT=$DIR/mariadb.socket
  mariadb-install-db --no-defaults --user="$(id -un)" --datadir="$DIR/mariadb" --skip-test-db \
    --auth-root-authentication-method=normal >"$DIR/log/mariadb-install.txt" 2>&1
  daemon mariadb mariadbd --no-defaults --user="$(id -un)" --datadir="$DIR/mariadb" \
    --socket="$MYSQL_UNIX_PORT" --pid-file="$DIR/state/mariadb.pid" --skip-networking \
    --innodb-buffer-pool-size=64M --innodb-flush-log-at-trx-commit=0
  eventually 60 mariadb-admin --no-defaults --socket="$MYSQL_UNIX_PORT" ping
  daemon slurmdbd slurmdbd -D
  eventually 60 sacctmgr -n list cluster
  sacctmgr -i add cluster tests >"$DIR/log/sacctmgr.txt"
}

configure() {
  local user i gres=""
  user=$(id -un)
  mkdir -p "$DIR"/{log,pids,state,spool,munge,key}
  chmod 755 "$DIR" "$DIR/munge"
  chmod 700 "$DIR/key"
  (umask 077 && head -c 1024 /dev/urandom >"$DIR/key/munge.key")
  : >"$DIR/plugstack.conf"
  cat >"$DIR/slurm.conf" <<CONF
ClusterName=tests
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$DIR/munge/socket
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/state/slurmctld.pid
SlurmdPidFile=$DIR/spool/%n.pid
PlugStackConfig=$DIR/plugstack.conf
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=10
MaxArraySize=1001
MaxJobCount=20000
ReturnToService=2
CONF
  if [ "$ACCOUNTING" = 0 ]; then
    printf '%s\n' AccountingStorageType=accounting_storage/none MinJobAge=3600 >>"$DIR/slurm.conf"
  else
    configure_accounting
  fi
  if make_gpus; then
    gres=" Gres=gpu:2"
    echo GresTypes=gpu >>"$DIR/slurm.conf"
    echo "NodeName=n[1-2] Name=gpu File=$DIR/dev/gpu[0-1]" >"$DIR/gres.conf"
  else
    say "no pretended GPUs: mknod is not permitted here"
  fi
  for i in 1 2; do
    echo "NodeName=n$i NodeHostname=$(hostname -s) NodeAddr=127.0.0.$((20 + i)) Port=$((PORT + i))" \
      "CPUs=2 Boards=1 SocketsPerBoard=1 CoresPerSocket=2 ThreadsPerCore=1 RealMemory=1000$gres" >>"$DIR/slurm.conf"
  done
  cat >>"$DIR/slurm.conf" <<CONF
PartitionName=low Nodes=n[1-2] Default=YES MaxTime=INFINITE DefaultTime=20 PriorityTier=1 PreemptMode=REQUEUE
PartitionName=high Nodes=n[1-2] MaxTime=INFINITE DefaultTime=20 PriorityTier=10 PreemptMode=OFF
CONF
}

start() {
  case $DIR in *[[:space:]]*) fail "no blanks in DIR: $DIR" ;; esac
  [ ${#DIR} -le 60 ] || fail "DIR is too long for sockets: $DIR"
  [ -z "$(ls -A "$DIR" 2>/dev/null)" ] || fail "$DIR is not empty"
  mkdir -p "$DIR"
  install_packages
  configure
  trap 'code=$?; [ $code = 0 ] || { tail -n 5 "$DIR"/log/*.txt >&2; stop; }' EXIT
  daemon munged munged -F --key-file="$DIR/key/munge.key" --socket="$DIR/munge/socket" \
    --pid-file="$DIR/munge/pid" --log-file="$DIR/log/munge.log" --seed-file="$DIR/key/seed"
  eventually 20 munge -S "$DIR/munge/socket" -n
  if [ "$ACCOUNTING" != 0 ]; then start_accounting; fi
  daemon slurmctld slurmctld -D
  eventually 60 controller_answers
  daemon slurmd-1 slurmd -D -N n1
  daemon slurmd-2 slurmd -D -N n2
  eventually 60 two_idle
}

# Jobs outlive their slurmd; those of this cluster are known by its SLURM_CONF.
job_steps() {
  local process
  for process in /proc/[0-9]*; do
    [ "$(cat "$process/comm" 2>/dev/null)" = slurmstepd ] || continue
    tr '\0' '\n' <"$process/environ" 2>/dev/null | grep -qxF "SLURM_CONF=$SLURM_CONF" || continue
    basename "$process"
  done
  return 0
}
no_jobs() { [ -z "$(job_steps)" ] && [ -z "$(squeue -h -t R,CG 2>/dev/null)" ]; }
with_children() {
  local child
  echo "$1"
  for child in $(cat "/proc/$1/task"/*/children 2>/dev/null); do with_children "$child"; done
  return 0
}

answers() {
  local state
  state=$(scontrol -o show node "$1" | grep -o ' State=[^ ]*') &&
    [[ ! $state =~ DOWN|NOT_RESPONDING|UNKNOWN|\* ]]
}
restart-node() {
  local node=${1:?which node?} name pid time
  name=slurmd-${node#n}
  [ -e "$DIR/pids/$name" ] || fail "no such node: $node"
  read -r pid time <"$DIR/pids/$name"
  while is_ours "$pid" "$time"; do
    kill -KILL "$pid" 2>/dev/null || true
    sleep 0.1
  done
  daemon "$name" slurmd -D -N "$node"
  eventually 60 answers "$node"
}

stop() {
  local step
  [ -d "$DIR/pids" ] || return 0
  if timeout 10 squeue -h >/dev/null 2>&1; then
    squeue -h -o %A | sort -u | xargs -r scancel || true
    eventually 20 no_jobs || true
  fi
  stop_daemons slurmd-1 slurmd-2 slurmctld slurmdbd
  stop_daemons mariadb munged
  for step in $(job_steps); do  # Of jobs that did not hear the above: their slurmd was gone.
    # shellcheck disable=SC2046
    kill -KILL $(with_children "$step") 2>/dev/null || true
  done
  rm -rf "$DIR/pids"
}

case ${1:-} in
  start | stop | restart-node)
    DIR=$(realpath -m -- "${2:?which folder?}")
    export SLURM_CONF=$DIR/slurm.conf
    "$1" "${@:3}"
    ;;
  installed)
    [ -z "$(missing)" ] || { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }
    ;;
  *)
    sed -n '2,/^set /s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
