"""What /metrics says: what dashboards for vLLM read, and our own beside it (`dovetail_`).

Counts come from the engine when they are asked for; times are taken where answers leave.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dovetail.engine.engine import Engine

_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_NEXT = (0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20)
_WHOLE = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The histograms, and the engine's counts."""

    def __init__(self, engine: Engine, model: str) -> None:
        self.registry = CollectorRegistry()

        def histogram(name: str, text: str, buckets: Iterable[float]) -> Histogram:
            made = Histogram(name, text, ["model_name"], buckets=tuple(buckets), registry=self.registry)
            return made.labels(model_name=model)

        self._first = histogram("vllm:time_to_first_token_seconds", "From arrival to the first token.", _FIRST)
        self._next = histogram("vllm:inter_token_latency_seconds", "Between one step's tokens and the next.", _NEXT)
        self._each = histogram(
            "vllm:request_time_per_output_token_seconds", "Mean of one request after its first token.", _NEXT
        )
        self._each_before = histogram(
            "vllm:time_per_output_token_seconds", "The same as inter_token_latency, under its older name.", _NEXT
        )
        self._whole = histogram("vllm:e2e_request_latency_seconds", "From arrival to the last token.", _WHOLE)
        prompts = Counter(
            "vllm:prompt_tokens", "Tokens of prompts whose answers began.", ["model_name"], registry=self.registry
        )
        self._prompts = prompts.labels(model_name=model)
        self.registry.register(_Counts(engine, model))

    def first_token(self, seconds: float, prompt_tokens: int) -> None:
        """Note the first token of a choice. Its whole prompt is counted, with what was found in the cache."""
        self._first.observe(seconds)
        self._prompts.inc(prompt_tokens)

    def next_tokens(self, seconds: float) -> None:
        """Note the tokens of a later step."""
        self._next.observe(seconds)
        self._each_before.observe(seconds)

    def per_token(self, seconds: float) -> None:
        """Note the mean of a whole choice."""
        self._each.observe(seconds)

    def request_ended(self, seconds: float) -> None:
        """Note a whole request."""
        self._whole.observe(seconds)

    def text(self) -> bytes:
        """Return everything in Prometheus's text form."""
        return generate_latest(self.registry)


class _Counts(Collector):
    def __init__(self, engine: Engine, model: str) -> None:
        self.engine, self.model = engine, model

    def collect(self) -> Iterator[Metric]:
        now = self.engine.statistics()
        drafts = {str(position): float(count) for position, count in enumerate(now.accepted)}
        tried = {str(position): float(count) for position, count in enumerate(now.drafted)}
        yield self._gauge("vllm:num_requests_running", "Sequences in the batch.", now.running)
        yield self._gauge("vllm:num_requests_waiting", "Sequences in the waiting room.", now.waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of the cache in use; 1 is all.", now.cache_usage)
        counters = {
            "dovetail_computed_prompt_tokens": (
                "Tokens of prompts that were computed: not found in the cache, or again after preemption.",
                now.prompt_tokens,
            ),
            "vllm:generation_tokens": ("Tokens generated.", now.generated_tokens),
            "vllm:prefix_cache_queries": (
                "Tokens of prompts looked up in the prefix cache.",
                now.prefix_queried_tokens,
            ),
            "vllm:prefix_cache_hits": ("Of these, found there.", now.prefix_hit_tokens),
            "vllm:num_preemptions": ("Sequences put back to be computed again.", now.preemptions),
            "vllm:spec_decode_num_drafts": ("Steps of a sequence with drafts.", now.drafted[0] if now.drafted else 0),
            "vllm:spec_decode_num_draft_tokens": ("Tokens drafted.", sum(now.drafted)),
            "vllm:spec_decode_num_accepted_tokens": ("Of these, accepted.", sum(now.accepted)),
        }
        for name, (text, value) in counters.items():
            yield self._counter(name, text, "", {"": float(value)})
        accepted = "vllm:spec_decode_num_accepted_tokens_per_pos"
        yield self._counter(accepted, "Drafts accepted, by position.", "position", drafts)
        yield self._counter("dovetail_draft_tokens_per_position", "Drafts made, by position.", "position", tried)
        finished = {reason: float(count) for reason, count in now.finished.items()}
        yield self._counter("vllm:request_success", "Choices that ended, by reason.", "finished_reason", finished)
        yield self._gauge("dovetail_step_seconds", "Time of the engine's steps.", now.step_seconds)
        yield self._gauge("dovetail_step_tokens", "Tokens in them.", now.step_tokens)
        why = GaugeMetricFamily("dovetail_speculation_info", "The depth in use, and why.", labels=["model_name", "why"])
        why.add_metric([self.model, now.speculation], 1)
        yield why

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=["model_name"])
        family.add_metric([self.model], value)
        return family

    def _counter(self, name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
        labels = ["model_name", *([label] if label else [])]
        family = CounterMetricFamily(name, text, labels=labels)
        for key, value in values.items():
            family.add_metric([self.model, *([key] if label else [])], value)
        return family
