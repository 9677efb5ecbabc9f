"""The speed limit of decoding if only exchanges take time, and the arithmetic of deployments.

    one exchange   dispatch and combine of one micro-batch: tokens x copies x hidden x (1 + 2 bytes) / bandwidth
    one layer      two micro-batches, one after the other on the network
    one token      all layers                                                                   [ISCA §2.3.2]

With the paper's assumptions (50 GB/s of a 400G card, 32 tokens per device, 8 routed experts and a shared one, hidden
"7K" = 7000, 61 layers, computation hidden, no latency) a token takes 14.76 ms, which is 67 tokens/s. Over the 900 GB/s
of a GB200 NVL72 it takes 0.82 ms, about 1,200 tokens/s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from dovetail.spec.band import Band
from dovetail.spec.hardware import Cluster, Link
from dovetail.spec.model import ModelSpec

PAPER_HIDDEN = 7000  # "7K" [ISCA §2.3.2]; the model's is 7168
PAPER_TOKENS = 32  # per device and step
DISPATCH_BYTES, COMBINE_BYTES = 1, 2  # per value: dispatch in FP8, combine in BF16
MICROBATCHES = 2
DAY = 86400.0
Number = TypeVar("Number", float, Band)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedLimit:
    """The time of a token in seconds, and its parts."""

    exchange: Band  # dispatch and combine of one micro-batch, without latency
    layers: int
    latency: Band  # in one direction
    bandwidth: Band  # bytes/s

    @property
    def layer(self) -> Band:
        return MICROBATCHES * self.exchange

    @property
    def token(self) -> Band:
        """The time per output token without latency, as the paper counts it."""
        return self.layers * self.layer

    @property
    def tokens_per_second(self) -> Band:
        return self.token.inverse()

    @property
    def waits(self) -> int:
        """The number of exchanges that a token waits for: two per layer and micro-batch."""
        return 2 * MICROBATCHES * self.layers

    @property
    def token_with_latency(self) -> Band:
        return self.token + self.waits * self.latency


def speed_limit(
    spec: ModelSpec,
    cluster: Cluster,
    *,
    hidden: int | None = None,
    tokens: float = PAPER_TOKENS,
    bytes_per_value: float = DISPATCH_BYTES + COMBINE_BYTES,
    achieved: bool = False,
    ranks: int | None = None,
) -> SpeedLimit:
    """Return the limit that the link between the experts' `ranks` (None: the whole cluster) sets.

    `hidden` None is the model's. With `achieved` the bandwidth is the one that is reached, not the datasheet's. Raises
    ValueError for a model without experts.
    """
    if spec.moe is None:
        raise ValueError("the model has no experts, so no exchange limits its speed")
    link = joining_link(cluster, ranks)
    bandwidth = link.bandwidth if achieved else Band.exact(link.gbs * 1e9)
    copies = spec.moe.num_experts_per_tok + spec.moe.n_shared_experts  # the shared expert as a ninth [V3 §3.4.2]
    sent = tokens * copies * (hidden or spec.hidden_size) * bytes_per_value
    return SpeedLimit(
        exchange=sent / bandwidth, layers=spec.num_hidden_layers, latency=link.latency, bandwidth=bandwidth
    )


def joining_link(cluster: Cluster, ranks: int | None = None) -> Link:
    """Return the scale-out link if the ranks are on several nodes, and the scale-up link if they are on one."""
    is_one_node = (ranks or cluster.gpus) <= cluster.gpus_per_node
    return cluster.scale_up if is_one_node or cluster.scale_out is None else cluster.scale_out


def nodes_for(tokens: Number, seconds: float, tokens_per_second: Number) -> Number:
    """Return the number of nodes that handle `tokens` in `seconds`, each always busy at `tokens_per_second`."""
    return tokens / seconds / tokens_per_second


def rent(nodes: float, gpus_per_node: int, dollars_per_gpu_hour: float, seconds: float = DAY) -> float:
    """Return the dollars for `nodes` over `seconds`."""
    return nodes * gpus_per_node * dollars_per_gpu_hour * seconds / 3600
