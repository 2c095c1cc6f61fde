#!/usr/bin/env bash
# A real Slurm on this machine alone, for tests: no systemd, no cgroups, no accounting.
#
#   scripts/slurm_cluster.sh start DIR   install if missing, start, wait until the nodes are idle
#   scripts/slurm_cluster.sh stop DIR    cancel its jobs, stop its own processes
#   scripts/slurm_cluster.sh installed   exit code 0: Slurm is installed, or can be (root, apt-get)
#
# Clients need SLURM_CONF=DIR/slurm.conf. Two nodes of 2 processors; the partition `high` preempts
# (and requeues) what runs in `low`. DIR is new or empty, without blanks, of at most 60 characters.
# SLURM_CLUSTER_PORT (default 26817) and the two ports after it must be free.
set -euo pipefail

PACKAGES=(slurmctld slurmd slurm-client munge)
PORT=${SLURM_CLUSTER_PORT:-26817}
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
started_at() { awk '{sub(/^.*\) /, ""); print $20}' "/proc/$1/stat" 2>/dev/null; }
daemon() {
  local name=$1
  shift
  setsid "$@" >"$DIR/log/$name.txt" 2>&1 </dev/null &
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
two_idle() { [ "$(sinfo -h -N -p low -t idle -o %N | wc -l)" = 2 ]; }

configure() {
  local user i
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
AccountingStorageType=accounting_storage/none
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
MinJobAge=3600
MaxArraySize=1001
MaxJobCount=20000
ReturnToService=2
CONF
  for i in 1 2; do
    echo "NodeName=n$i NodeHostname=$(hostname -s) NodeAddr=127.0.0.$((20 + i)) Port=$((PORT + i))" \
      "CPUs=2 Boards=1 SocketsPerBoard=1 CoresPerSocket=2 ThreadsPerCore=1 RealMemory=1000" >>"$DIR/slurm.conf"
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
  daemon slurmctld slurmctld -D
  eventually 30 scontrol ping
  daemon slurmd-1 slurmd -D -N n1
  daemon slurmd-2 slurmd -D -N n2
  eventually 60 two_idle
}

# Jobs outlive their slurmd; those of this cluster are known by its SLURM_CONF.
has_jobs() {
  local process
  for process in /proc/[0-9]*; do
    [ "$(cat "$process/comm" 2>/dev/null)" = slurmstepd ] || continue
    tr '\0' '\n' <"$process/environ" 2>/dev/null | grep -qxF "SLURM_CONF=$SLURM_CONF" && return 0
  done
  return 1
}
no_jobs() { ! has_jobs && [ -z "$(squeue -h -t R,CG 2>/dev/null)" ]; }

stop() {
  [ -d "$DIR/pids" ] || return 0
  if timeout 10 squeue -h >/dev/null 2>&1; then
    squeue -h -o %A | sort -u | xargs -r scancel || true
    eventually 20 no_jobs || true
  fi
  stop_daemons slurmd-1 slurmd-2 slurmctld
  stop_daemons munged
  rm -rf "$DIR/pids"
}

case ${1:-} in
  start | stop)
    DIR=$(realpath -m -- "${2:?which folder?}")
    export SLURM_CONF=$DIR/slurm.conf
    "$1"
    ;;
  installed)
    [ -z "$(missing)" ] || { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }
    ;;
  *)
    sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
