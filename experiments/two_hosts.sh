#!/usr/bin/env bash
# Two hosts on one Linux machine, joined by a link: start a script with torchrun on both.
#
#     bash experiments/two_hosts.sh PYTHON SCRIPT OPTIONS...
#
# A host is a network namespace. Each finds the name of its end of the link in GLOO_SOCKET_IFNAME,
# and may slow it down: tc qdisc replace dev "$GLOO_SOCKET_IFNAME" root tbf rate 100mbit ...
set -e
if [ -z "$TWO_HOSTS" ]; then
    TWO_HOSTS=1 exec unshare --user --map-root-user --net bash "$0" "$@"
fi
python=$1
shift
unshare --net sleep 3600 & other=$!
trap 'kill $other' EXIT
until [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.1; done
there="nsenter --target $other --net"

ip link add veth0 type veth peer name veth1 netns $other
ip addr add 10.9.0.1/24 dev veth0
$there ip addr add 10.9.0.2/24 dev veth1
ip link set lo up
ip link set veth0 up
$there ip link set lo up
$there ip link set veth1 up

torchrun="$python -m torch.distributed.run --nnodes=2 --nproc-per-node=1 --master-addr=10.9.0.1"
GLOO_SOCKET_IFNAME=veth1 $there $torchrun --node-rank=1 "$@" & second=$!
GLOO_SOCKET_IFNAME=veth0 $torchrun --node-rank=0 "$@"
wait $second
