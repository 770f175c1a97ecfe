#!/usr/bin/env bash
# two_hosts.sh PROGRAM MODE [cut]: rank 0 and rank 1 of PROGRAM in two network namespaces joined by a cable (veth).
# Prints who listens where; "cut" pulls the cable once both ranks work. Exit status 77: not permitted here.
# All of it is in namespaces of this process, so that nothing is left behind.
set -u
if [ "${FSDP_INSIDE:-}" = "" ]; then
  for tool in unshare ip ss; do
    PATH=$PATH:/usr/sbin command -v $tool >/dev/null || { echo "skipped: no $tool"; exit 77; }
  done
  unshare -Urnm true 2>/dev/null || { echo "skipped: network namespaces are not permitted"; exit 77; }
  FSDP_INSIDE=1 exec unshare -Urnm --fork --kill-child bash "$0" "$@"
fi
PATH=$PATH:/usr/sbin
program=$1 mode=$2 cut=${3:-}
made() {
  mount -t tmpfs none /run && mkdir /run/netns && ip netns add other &&
    ip link add cable0 type veth peer name cable1 && ip link set cable1 netns other &&
    ip addr add 10.77.0.1/24 dev cable0 && ip link set cable0 up && ip link set lo up &&
    ip netns exec other ip addr add 10.77.0.2/24 dev cable1 &&
    ip netns exec other ip link set cable1 up && ip netns exec other ip link set lo up
}
made 2>&1 || { echo "skipped: cannot join two network namespaces"; exit 77; }
listeners() { echo "$1 listens at: $(${2:-} ss -Hltn | awk '{print $4}' | sort | tr '\n' ' ')"; }

export WORLD_SIZE=2 LOCAL_WORLD_SIZE=1 LOCAL_RANK=0 MASTER_ADDR=10.77.0.1 MASTER_PORT=29500
export FSDP_RENDEZVOUS_TOKEN=secret
log=$(mktemp -d) && mount -t tmpfs none "$log"
RANK=0 "$program" "$mode" >"$log/0" 2>&1 &
first=$!
for _ in $(seq 200); do [ -n "$(ss -Hltn)" ] && break; sleep 0.05; done
listeners "early rank 0"
RANK=1 ip netns exec other "$program" "$mode" >"$log/1" 2>&1 &
second=$!
if [ "$mode" = work ]; then
  for _ in $(seq 600); do [ "$(cat "$log"/? | grep -c works)" = 2 ] && break; sleep 0.05; done
  listeners "rank 0"
  listeners "rank 1" "ip netns exec other"
fi
[ "$cut" = cut ] && { ip link set cable0 down; cut_at=$(date +%s%N); }
wait $first; echo "rank 0 ended with $?"
wait $second; echo "rank 1 ended with $?"
[ "$cut" = cut ] && echo "noticed after $((($(date +%s%N) - cut_at) / 1000000)) ms"
cat "$log/0" "$log/1"
umount "$log" && rmdir "$log"
