"""`dovetail cluster` from the shell: bytes and rates of real links, and the ways in which a run ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_shell import namespaces, run, start

from dovetail.cluster import links
from dovetail.cluster.launch import END_SECONDS, environment
from dovetail.cluster.shape import Shape

PAYLOAD = 1_500_000  # bytes
SEGMENT = links.MTU - 20 - 32  # bytes of a packet that TCP fills, after the headers of IP and TCP
HEADERS = links.HEADER + 20 + 32  # bytes beside each segment
TALK = 15_000  # bytes at most for what is no payload: ARP, torch's store, gloo's connections and barriers

SEND = f"""
import json, sys, time, torch, torch.distributed as dist
dist.init_process_group("gloo")
payload = torch.arange({PAYLOAD}).to(torch.uint8)
received = torch.zeros_like(payload)
dist.barrier()
start = time.perf_counter()
if dist.get_rank() == 0:
    dist.send(payload, 1)
else:
    dist.recv(received, 0)
    assert torch.equal(received, payload)
    open(sys.argv[1], "w").write(json.dumps(time.perf_counter() - start))
print("rank", dist.get_rank(), "of", dist.get_world_size(), "has", torch.get_num_threads(), "threads")
dist.destroy_process_group()
"""


@pytest.fixture
def linked() -> Iterator[None]:
    """Where links can be made; a test leaves as many namespaces, and files for them, as it found."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None:
        pytest.skip("network namespaces need root and iproute2")
    before, files = namespaces(), links.HOSTS.exists()
    yield
    assert namespaces() == before and links.HOSTS.exists() == files


def wait_for(path: Path, seconds: float = 10.0) -> str:
    """What a rank has written to `path`, as soon as it has."""
    end = time.monotonic() + seconds
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < end, f"{path} was not written in {seconds} s"
        time.sleep(0.02)
    return path.read_text()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.usefixtures("linked")
def test_bytes_are_those_sent_with_their_headers_and_the_rate_is_kept(tmp_path: Path) -> None:
    seconds = tmp_path / "seconds"
    command = ("--", sys.executable, "-c", SEND, str(seconds))
    done = run("--nodes", "2", "--ranks", "1", "--nic", "20Mbit", "--json", *command, seconds=60)
    assert done.returncode == 0, done.stderr
    of = {(link["node"], link["kind"]): link for link in json.loads(done.stdout)["links"]}
    wire = PAYLOAD + HEADERS * -(-PAYLOAD // SEGMENT)
    assert wire <= of[0, "nic"]["sent"] <= wire + TALK
    assert 0 <= of[1, "nic"]["received"] - of[0, "nic"]["sent"] <= TALK  # the switch speaks too, a few words
    assert of[1, "nic"]["sent"] <= HEADERS * -(-PAYLOAD // SEGMENT) + TALK  # one answer for each packet at most
    assert of[0, "nic"]["dropped"] == of[1, "nic"]["dropped"] == 0
    assert wire * 8 / float(seconds.read_text()) == pytest.approx(20e6, rel=0.15)
    assert done.stderr.splitlines()[0].startswith("2 nodes x 1 ranks, 20 Mbit/s between nodes each way; each rank has")
    assert sorted(done.stderr.splitlines()[1:]) == [  # and no warning
        "[node 1 rank 1] rank 1 of 2 has 1 threads",
        "rank 0 of 2 has 1 threads",
    ]


@pytest.mark.usefixtures("linked")
def test_ranks_see_the_interfaces_of_their_node_and_no_other() -> None:
    script = "echo $(ls /sys/class/net) rank $RANK of $WORLD_SIZE, $LOCAL_RANK of $LOCAL_WORLD_SIZE at $MASTER_ADDR"
    done = run("--nodes", "2", "--ranks", "2", "--", "sh", "-c", script)
    assert done.returncode == 0, done.stderr
    said = [f"lo nic rank {rank} of 4, {rank % 2} of 2 at 10.77.0.1" for rank in range(4)]
    lines = done.stdout.splitlines()
    assert sorted(lines[:4]) == sorted(
        [said[0], *(f"[node {each // 2} rank {each}] {said[each]}" for each in (1, 2, 3))]
    )
    assert lines[4].startswith("bytes sent in ")
    assert [line.split("  ")[0] for line in lines[6:]] == [
        *("node 0 to the switch", "inside node 0", "node 1 to the switch", "inside node 1")
    ]


@pytest.mark.usefixtures("linked")
@pytest.mark.parametrize(
    ("end", "code", "how"),
    [("exit 7", 7, "ended with exit code 7"), ("kill -9 $$", 137, "was killed by SIGKILL")],
)
def test_a_rank_that_fails_or_is_killed_ends_the_others(end: str, code: int, how: str, tmp_path: Path) -> None:
    """The others do not listen to SIGTERM, and have children in sessions of their own."""
    pid = tmp_path / "pid"
    script = f"if [ $RANK = 2 ]; then sleep 0.3; {end}; fi; trap '' TERM; setsid sleep 60 & echo $! > {pid}; wait"
    begin = time.monotonic()
    done = run("--nodes", "2", "--ranks", "2", "--", "sh", "-c", script)
    assert time.monotonic() - begin < END_SECONDS + 4.0
    assert done.returncode == code
    assert done.stderr.splitlines()[-1] == f"dovetail: rank 2 (node 1) {how}; the other ranks were stopped"
    assert "inside node 1" in done.stdout
    assert not is_alive(int(pid.read_text()))


@pytest.mark.usefixtures("linked")
@pytest.mark.parametrize(("trap", "presses"), [("trap 'echo saved; exit 0' INT", 1), ("trap '' INT", 2)])
def test_ctrl_c_is_passed_on_and_a_second_one_kills(trap: str, presses: int, tmp_path: Path) -> None:
    files = [tmp_path / f"{rank}" for rank in range(2)]
    script = f"{trap}; echo y > {tmp_path}/$RANK; while true; do sleep 0.1; done"
    process = start("--", "sh", "-c", script)
    for file in files:
        wait_for(file)
    for _ in range(presses):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    out, error = process.communicate(timeout=5)
    assert process.returncode == 130
    assert error.splitlines()[-1] == "dovetail: stopped by SIGINT; all ranks have ended"
    assert sorted(out.splitlines()) == (["[node 1 rank 1] saved", "saved"] if presses == 1 else [])


@pytest.mark.usefixtures("linked")
def test_a_killed_cluster_is_removed_by_the_next_and_a_living_one_is_not(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    before = namespaces()
    process = start("--", "sh", "-c", f"setsid sleep 60 & [ $RANK = 1 ] && echo $! $$ > {pids}; wait")
    child, rank = map(int, wait_for(pids).split())
    own = sorted(namespaces() - before)
    assert len(own) == 3 and own[0].endswith("-node0")
    beside = run("--", "true")
    assert beside.returncode == 0 and "removed" not in beside.stderr and is_alive(rank)
    with process:
        process.kill()
        process.stdout.close()  # the child still holds its other end
        process.stderr.close()
    after = run("--", "true")
    left = f"removed what a killed cluster left: the namespaces {own[0].removesuffix('node0')}*"
    assert after.returncode == 0 and left in after.stderr.splitlines()
    assert not is_alive(child) and not is_alive(rank)


@pytest.mark.usefixtures("linked")
def test_an_exception_leaves_nothing() -> None:
    shape = Shape(nodes=3, ranks=1, nic=1e6)
    with pytest.raises(ZeroDivisionError), links.links(shape, print) as made:
        assert {*made.nodes, made.switch} <= namespaces()
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        (("--", "no-such-program"), "no-such-program: no such command, and no run file (.toml)"),
        (("--set", "train.steps=2", "--", "true"), "--set train.steps=2: true is no run file (.toml), whose keys"),
        (("--nic", "fast", "--", "true"), "--nic 'fast': expected a rate in bits per second"),
        (("missing.toml",), "missing.toml: "),
    ],
)
@pytest.mark.usefixtures("linked")
def test_a_mistake_is_one_line_at_once(words: tuple[str, ...], refusal: str) -> None:
    done = run(*words)
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith(f"dovetail: {refusal}"), done.stderr


@pytest.mark.usefixtures("linked")
def test_a_packet_is_delayed_or_the_kernel_is_named() -> None:
    """Whether it has netem is the machine's affair, so one of the two is seen."""
    meet = (
        "import os, socket, time\n"
        "if os.environ['RANK'] == '0':\n"
        "    server = socket.create_server(('10.77.0.1', 29501)); peer, _ = server.accept(); peer.recv(1)\n"
        "else:\n"
        "    time.sleep(0.5); start = time.perf_counter(); socket.create_connection(('10.77.0.1', 29501)).send(b'x')\n"
        "    print(time.perf_counter() - start)\n"
    )
    done = run("--latency", "100ms", "--json", "--", sys.executable, "-c", meet)
    if done.returncode:
        assert len(done.stderr.splitlines()) == 2
        assert "load it (modprobe sch_netem), or omit --latency" in done.stderr.splitlines()[1]
    else:
        assert 0.2 <= float(done.stderr.splitlines()[-1].removeprefix("[node 1 rank 1] ")) < 0.6  # there and back


def test_without_root_or_iproute2_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda program: f"/sbin/{program}")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ValueError, match=r"which root alone may make: run it as root \(sudo\)"):
        links.check()
    monkeypatch.setattr("shutil.which", lambda program: None)
    with pytest.raises(ValueError, match=r"needs ip and tc of iproute2: install it \(apt install iproute2\)"):
        links.check()


def test_the_environment_is_torchruns() -> None:
    """But for what speaks of its agent."""
    given = environment(Shape(nodes=2, ranks=3, nic=1e6), 4, "10.77.0.1")
    assert {name: given[name] for name in given if "OMP" not in name and "PYTHON" not in name} == {
        "RANK": "4",
        "WORLD_SIZE": "6",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "3",
        "GROUP_RANK": "1",
        "GROUP_WORLD_SIZE": "2",
        "ROLE_NAME": "default",
        "ROLE_RANK": "4",
        "ROLE_WORLD_SIZE": "6",
        "MASTER_ADDR": "10.77.0.1",
        "MASTER_PORT": "29500",
        "TORCHELASTIC_RUN_ID": "dovetail-cluster",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "GLOO_SOCKET_IFNAME": "nic",
        "NCCL_SOCKET_IFNAME": "nic",
    }


def test_running_a_command_never_loads_torch() -> None:
    lines = (
        "import sys",
        "import dovetail.cli.app, dovetail.cluster.report, dovetail.cluster.run",
        "assert 'torch' not in sys.modules",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, timeout=30)
