"""SimGrid as the other side: flows over given routes, or over a network of its own, and the second when each one ends.

Run by the Python that SimGrid is installed for (Debian: python3-simgrid), which need not be dovetail's, and which needs
nothing else. A demand comes as JSON on the standard input, the answer goes as JSON to the standard output:

    hosts                                 how many there are
    source, destination, bytes, start     one entry per flow; whole bytes, seconds
    capacity, latency, route              bytes/s and seconds of each link, which is of one direction, and the links of
                                          each flow: one route for a source and a destination
    zone                                  instead of those, a network that SimGrid wires and routes by itself:
                                          {"kind": "fat-tree", "bandwidth": b, "down": [..], "up": [..], "count": [..]}
                                          {"kind": "dragonfly", "bandwidth": b, "groups": g, "switches_per_group": a,
                                          "endpoints_per_switch": p}

    end                                   seconds when each flow ended
    build_s, run_s, run_cpu_s             making network and routes; starting flows and running them, of the clock and
                                          of the processor
    peak_gib, version

SimGrid weighs a flow by the reciprocal of its latency, so that shares are equal where no link has any, or all routes
the same; the time of transfer follows the latency. Flows whose ends are within 1e-9 s end together.
"""

import json
import resource
import sys
import time

import simgrid

PLAIN = (
    "network/model:CM02",  # max-min sharing and no factors: unlike in LV08, the default, links give all they have
    "network/crosstraffic:0",  # else flows take a share of the links of the way back, for what is acknowledged
    "network/optim:Full",  # all rates anew at each event: quicker on these demands than Lazy, the default, or the same
)


def main() -> None:
    demand = json.load(sys.stdin)
    begun = time.perf_counter()
    engine = simgrid.Engine(["simgrid", "--log=root.thresh:warning", *(f"--cfg={option}" for option in PLAIN)])
    hosts = own_network(demand["zone"]) if "zone" in demand else given_network(demand)
    transfers = [None] * len(demand["bytes"])

    def attend(sends: list, receives: list) -> None:
        # Each with the place where its message comes to lie, which must last.
        awaited = [simgrid.Mailbox.by_name(str(flow)).get_async() for flow in receives]
        for flow in sends:
            if demand["start"][flow] > engine.clock:
                simgrid.this_actor.sleep_until(demand["start"][flow])
            transfers[flow] = simgrid.Mailbox.by_name(str(flow)).put_async(flow, demand["bytes"][flow])
        simgrid.Comm.wait_all([transfers[flow] for flow in sends])
        simgrid.Comm.wait_all([transfer for transfer, _ in awaited])

    # Not Comm.sendto_async: all such transfers are in one list, which is searched when one of them ends.
    columns = zip(hosts, flows_by(demand, "source"), flows_by(demand, "destination"), strict=True)
    for number, (host, sends, receives) in enumerate(columns):
        simgrid.Actor.create(f"actor {number}", host, attend, sends, receives)
    built, built_cpu = time.perf_counter(), time.process_time()
    engine.run()
    done, done_cpu = time.perf_counter(), time.process_time()
    answer = {
        "end": [transfer.finish_time for transfer in transfers],
        "build_s": built - begun,
        "run_s": done - built,
        "run_cpu_s": done_cpu - built_cpu,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "version": simgrid.simgrid_version,
    }
    print(json.dumps(answer))


def flows_by(demand: dict, end: str) -> list:
    """Those of each host, in order of their starts."""
    flows = [[] for _ in range(demand["hosts"])]
    for flow in sorted(range(len(demand["start"])), key=demand["start"].__getitem__):
        flows[demand[end][flow]].append(flow)
    return flows


def given_network(demand: dict) -> list:
    zone = simgrid.NetZone.create_full_zone("given")
    hosts = [zone.create_host(f"host {number}", 1.0) for number in range(demand["hosts"])]
    links = []
    for number, (capacity, latency) in enumerate(zip(demand["capacity"], demand["latency"], strict=True)):
        link = zone.create_link(f"link {number}", capacity)
        link.set_latency(latency)
        link.seal()
        links.append(simgrid.LinkInRoute(link))
    routes = {}
    for source, destination, route in zip(demand["source"], demand["destination"], demand["route"], strict=True):
        if routes.setdefault((source, destination), route) != route:
            sys.exit(f"two routes from {source} to {destination}")
    for (source, destination), route in routes.items():
        ends = hosts[source].netpoint, hosts[destination].netpoint
        zone.add_route(*ends, None, None, [links[number] for number in route], False)
    zone.seal()
    return hosts


def own_network(shape: dict) -> list:
    root = simgrid.NetZone.create_full_zone("root")
    hosts = []

    def create_host(zone: simgrid.NetZone, coordinates: list, number: int) -> tuple:
        host = zone.create_host(f"host {number}", 1.0)
        hosts.append(host)
        return host.netpoint, None

    if shape["kind"] == "fat-tree":
        create = simgrid.NetZone.create_fatTree_zone
        wiring = simgrid.FatTreeParams(len(shape["down"]), shape["down"], shape["up"], shape["count"])
    else:
        # One chassis per group, so that all its switches are joined.
        create = simgrid.NetZone.create_dragonfly_zone
        group, endpoints = (shape["switches_per_group"], 1), shape["endpoints_per_switch"]
        wiring = simgrid.DragonflyParams((shape["groups"], 1), (1, 1), group, endpoints)
    callbacks = simgrid.ClusterCallbacks(create_host, None, None)
    both_ways = simgrid.Link.SharingPolicy.SPLITDUPLEX
    create("own", root, wiring, callbacks, shape["bandwidth"], 0.0, both_ways).seal()
    root.seal()
    return hosts


if __name__ == "__main__":
    main()
