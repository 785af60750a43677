# Two machines on one, to try a run over several: network namespaces with a host name each and a
# cable between them. Needs Linux and root.  Then: machines_up; on 1 COMMAND; on 2 COMMAND; machines_down
machines_up() {
    for n in 1 2; do
        ip netns add node$n
        mkdir -p /etc/netns/node$n # mounted over /etc there
        printf '127.0.0.1 localhost\n10.77.0.1 node1\n10.77.0.2 node2\n' >/etc/netns/node$n/hosts
        ip -n node$n link set lo up
    done
    ip link add eth0 netns node1 type veth peer name eth0 netns node2
    for n in 1 2; do
        ip -n node$n addr add 10.77.0.$n/24 dev eth0
        ip -n node$n link set eth0 up
    done
}

on() {
    ip netns exec "node$1" unshare --uts sh -c 'hostname "node$1"; shift; exec "$@"' sh "$@"
}

# Process ids on machine $1: of the torchrun agent, and of what it started.
agent_on() { pgrep -f -o --ns "$(ip netns pids "node$1" | head -n 1)" --nslist net torchrun; }
workers_on() { pgrep -P "$(agent_on "$1")"; }

machines_down() {
    for n in 1 2; do
        ip netns pids node$n | xargs -r kill -9
        ip netns del node$n
        rm -r /etc/netns/node$n
    done
}
