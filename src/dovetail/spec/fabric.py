"""A network fabric as a user describes it: its kind, its size, and the speed of its links.

    fat-tree   two or three layers of switches. Several planes are several separate networks, with GPU i of a node on
               plane i mod planes [ISCA §5.1]; by_rail puts GPU i of every node on the switches of rail i, which share
               spines
    slim-fly   a McKay-Miller-Siran graph of diameter two, made from a prime power q
    dragonfly  groups of switches, all joined within a group, and with a cable between every two groups

A size that is left out is the smallest that holds the endpoints. Keys carry units (gbs = 10^9 bytes/s one way).
`network.fabric.topology.build` makes the links of a fabric from this description.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from dovetail.config import Record
from dovetail.spec.hardware import Link
from dovetail.spec.measurements import Estimate

Kind = Literal["fat-tree", "slim-fly", "dragonfly"]
Poster = Literal["host", "gpu"]
ONLY_FOR: dict[str, Kind] = {
    "layers": "fat-tree",
    "by_rail": "fat-tree",
    "q": "slim-fly",
    "groups": "dragonfly",
    "switches_per_group": "dragonfly",
    "global_per_switch": "dragonfly",
}


class Storage(Record):
    """A separate network of two layers for files, with one NIC per node and servers [ISCA §5.1: 400G RoCE]."""

    radix: PositiveInt
    servers: int = Field(default=0, ge=0)
    nics_per_server: PositiveInt = 1
    nic: Link


class Posting(Record):
    """The time until the sender of a message to another node can send the next one, whatever the message's size.

    Within a node GPUs write to each other's memory without a request to a NIC. No cost is published for that, and
    none is charged.
    """

    host_us: Estimate  # if one thread of a CPU hands messages to the NIC, as NCCL's proxies do
    gpu_us: Estimate  # if many warps of the GPU itself do, on many queue pairs (IBGDA)

    def seconds(self, poster: Poster) -> float:
        return (self.host_us if poster == "host" else self.gpu_us).value * 1e-6


class FabricSpec(Record):
    """A fabric. Its endpoints are GPUs, each with a NIC of one port, or with planes_per_nic one port to each plane."""

    name: str = Field(min_length=1)
    source: str = Field(min_length=1)
    kind: Kind
    endpoints: PositiveInt
    radix: PositiveInt  # ports of a switch
    layers: Literal[2, 3] = 2
    planes: PositiveInt = 1
    planes_per_nic: PositiveInt = 1  # 1 if a NIC is on one plane; the number of planes if it has a port on each
    by_rail: bool = False
    q: PositiveInt | None = None
    groups: PositiveInt | None = None  # g
    switches_per_group: PositiveInt | None = None  # a
    global_per_switch: PositiveInt | None = None  # h
    endpoints_per_switch: PositiveInt | None = None  # p, for slim flies and dragonflies
    gpus_per_node: PositiveInt = 1
    nic: Link  # its latency is that between two NICs on one switch
    hop_us: Estimate  # added for each cable between switches
    posting: Posting | None = None  # None: messages cost nothing but their latency
    nvlink: Link | None = None  # its latency is that between two GPUs of a node
    pcie: Link | None = None  # a GPU's lanes to its NIC and the host; None: not modelled, as if it never limited
    storage: Storage | None = None

    @model_validator(mode="after")
    def _keys_belong_to_the_kind(self) -> FabricSpec:
        for key, kind in ONLY_FOR.items():
            if key in self.model_fields_set and self.kind != kind and getattr(self, key) not in (None, False):
                raise ValueError(
                    f"{key} = {getattr(self, key)} is for kind = {kind!r}, not {self.kind!r}: leave it out"
                )
        if self.endpoints_per_switch is not None and self.kind == "fat-tree":
            raise ValueError("endpoints_per_switch is for slim-fly and dragonfly; a leaf of a fat tree has radix / 2")
        return self

    @model_validator(mode="after")
    def _nodes_and_planes_divide(self) -> FabricSpec:
        gpus, planes = self.gpus_per_node, self.planes
        if self.endpoints % gpus:
            below, above = self.endpoints // gpus * gpus, -(-self.endpoints // gpus) * gpus
            nearest = f"{below} or {above}" if below else f"{above}"
            raise ValueError(f"endpoints = {self.endpoints} is not a multiple of gpus_per_node = {gpus}: use {nearest}")
        if self.planes_per_nic not in (1, planes):
            raise ValueError(f"planes_per_nic = {self.planes_per_nic}: use 1, or planes = {planes} for a port on each")
        if self.planes_per_nic == 1 and gpus % planes:
            legal = [each for each in range(1, gpus + 1) if gpus % each == 0]
            nearest_planes = min(legal, key=lambda each: (abs(each - planes), -each))
            raise ValueError(
                f"planes = {planes} does not divide gpus_per_node = {gpus}, and GPU i is on plane i mod planes: "
                f"use {nearest_planes}"
            )
        if self.by_rail and planes > 1:
            raise ValueError(f"by_rail with planes = {planes}: rails share spines, planes do not; choose one")
        if gpus > 1 and self.nvlink is None and planes > 1 and self.planes_per_nic == 1:
            raise ValueError(f"planes = {planes} without [nvlink]: nothing would join GPUs on different planes")
        if self.storage is not None and self.pcie is None:
            raise ValueError("[storage] needs [pcie]: files reach a GPU through its node's host")
        return self

    @property
    def nodes(self) -> int:
        return self.endpoints // self.gpus_per_node

    def posting_seconds(self, messages: float, poster: Poster = "host") -> float:
        """Return the seconds until the last of `messages` in a row is posted. The first one's are in its latency."""
        return (messages - 1) * self.posting.seconds(poster) if self.posting and messages > 1 else 0.0
