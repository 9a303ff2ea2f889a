#!/usr/bin/env bash
# Several hosts on one machine, to test clusters. Each has its own network address, processes, host name, /dev/shm and
# sshd, and a copy-on-write view of this machine's disk: what it writes, at most 6 GiB, is private and temporary.
# All share the folder /shared, as servers share an NFS folder. Traffic stays on this machine (10.78.0.1/24).
# Needs root, and Debian's iproute2, openssh-server, openssh-client, rsync, curl and procps.
#
#   hosts.sh packages      install the missing ones
#   hosts.sh up 3          start hosts 1 to 3, at 10.78.0.11 to 10.78.0.13
#   hosts.sh run 2 CMD…    run CMD on host 2 over ssh
#   hosts.sh kill 2        power off host 2: kill all its processes and take its link down
#   hosts.sh start 2       power it on again, with the same disk and only sshd running
#   hosts.sh cut 2         take host 2's network link down; its processes keep running
#   hosts.sh join 2        bring its link up again
#   hosts.sh down          stop and remove everything that `up` created
#
# State, the SSH key `key` and the shared folder are in $CSMAE_HOSTS (default /tmp/csmae-hosts). For a second lab on the
# same machine set another one, and another $CSMAE_NETWORK (default 10.78.0).
set -euo pipefail
state=${CSMAE_HOSTS:-/tmp/csmae-hosts}
network=${CSMAE_NETWORK:-10.78.0}
prefix=csmae${CSMAE_NETWORK:+-${network//./}-}
bridge=${prefix}0

address() { echo "$network.$((10 + $1))"; }

run() {
  local host=$1
  shift
  ssh -i "$state/key" -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR \
    "root@$(address "$host")" "$@"
}

missing() { # Debian packages whose commands are missing
  [ "$(id -u)" = 0 ] || { echo "hosts.sh: must run as root: network namespaces need it" >&2; exit 2; }
  local package
  for package in ip:iproute2 /usr/sbin/sshd:openssh-server ssh:openssh-client rsync:rsync curl:curl pgrep:procps; do
    command -v "${package%%:*}" >/dev/null || echo "${package##*:}"
  done
}

check() {
  local packages
  packages=$(missing)
  [ -z "$packages" ] || { echo "hosts.sh: missing: apt-get install" $packages >&2; exit 2; }
}

install_packages() {
  local packages
  packages=$(missing)
  [ -n "$packages" ] || return 0
  command -v apt-get >/dev/null || { echo "hosts.sh: install" $packages "with this system's package manager" >&2; exit 2; }
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages
}

make_network() {
  ip link add "$bridge" type bridge
  ip addr add "$network.1/24" dev "$bridge"
  ip link set "$bridge" up
}

make_host() { # its disk and its network card
  local dir="$state/$1" name="$prefix$1"
  mkdir -p "$dir"
  mount -t tmpfs -o size=6G tmpfs "$dir"
  mkdir "$dir/written" "$dir/work" "$dir/root"
  mount -t overlay overlay -o "lowerdir=/,upperdir=$dir/written,workdir=$dir/work" "$dir/root"
  mkdir -p "$dir/root/shared" "$dir/root/run/sshd" "$dir/root/root/.ssh"
  cp "$state/key.pub" "$dir/root/root/.ssh/authorized_keys"
  rm -rf "$dir/root/root/.ray" "$dir/root/tmp/ray"
  cat >"$dir/root/etc/ssh/sshd_config" <<END
HostKey /etc/ssh/hostkey
PermitRootLogin prohibit-password
UsePAM no
StrictModes no
PidFile none
Subsystem sftp internal-sftp
END
  cp "$state/hostkey" "$dir/root/etc/ssh/hostkey"
  ip netns add "$name"
  ip link add "$name" type veth peer name eth0 netns "$name"
  ip link set "$name" master "$bridge"
  ip -n "$name" addr add "$(address "$1")/24" dev eth0
  ip -n "$name" link set lo up
}

start_host() { # its link and its processes
  local root="$state/$1/root" name="$prefix$1"
  ip link set "$name" up
  ip -n "$name" link set eth0 up
  ip -n "$name" route replace default via "$network.1" # Ray uses the address of the default route
  setsid ip netns exec "$name" unshare --mount --uts --ipc --pid --fork --kill-child bash -c "
    set -e
    hostname $name
    mount --rbind /dev '$root/dev'
    mount -t tmpfs tmpfs '$root/dev/shm'
    mount --rbind /sys '$root/sys'
    mount -t proc proc '$root/proc'
    mount --bind '$state/shared' '$root/shared'
    exec chroot '$root' /usr/sbin/sshd -D -e
  " </dev/null >>"$state/$1/console" 2>&1 &
  echo $! >"$state/$1/pid"
  for _ in $(seq 100); do
    if run "$1" true 2>/dev/null; then return; fi
    sleep 0.1
  done
  echo "hosts.sh: host $1 does not answer; see $state/$1/console" >&2
  exit 1
}

kill_host() {
  kill -9 -- "-$(cat "$state/$1/pid")" 2>/dev/null || true
  ip link set "$prefix$1" down
}

remove_host() {
  kill_host "$1" 2>/dev/null || true
  for _ in $(seq 300); do # until the last process is gone
    if umount --recursive "$state/$1" 2>/dev/null; then break; fi
    sleep 0.1
  done
  ip netns del "$prefix$1" 2>/dev/null || true
  ip link del "$prefix$1" 2>/dev/null || true
}

case ${1:-} in
  packages) install_packages ;;
  up)
    check
    [ ! -e "$state" ] || { echo "hosts.sh: $state exists already: hosts.sh down" >&2; exit 2; }
    ! ip link show "$bridge" >/dev/null 2>&1 || { echo "hosts.sh: $network belongs to another lab: set CSMAE_NETWORK" >&2; exit 2; }
    mkdir -p "$state/shared" "$state/home"
    ssh-keygen -q -t ed25519 -N '' -f "$state/key"
    ssh-keygen -q -t ed25519 -N '' -f "$state/hostkey"
    make_network
    for host in $(seq 1 "$2"); do make_host "$host"; done
    for host in $(seq 1 "$2"); do start_host "$host"; done
    ;;
  run) shift; run "$@" ;;
  kill) kill_host "$2" ;;
  start) start_host "$2" ;;
  cut) ip link set "$prefix$2" down ;;
  join) ip link set "$prefix$2" up ;;
  down)
    [ -d "$state" ] || exit 0
    for dir in "$state"/[0-9]*; do [ -d "$dir" ] && remove_host "$(basename "$dir")"; done
    ip link del "$bridge" 2>/dev/null || true
    rm -rf --one-file-system "$state"
    ;;
  *) sed -n '2,18p' "$0"; exit 2 ;;
esac
