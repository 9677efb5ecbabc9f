"""What four models weigh, compute and cache, before anything is built; nothing here loads torch."""

from dovetail.catalog.presets import load_model
from dovetail.cost.count import cache_bytes_per_token, parameters, training_flop_per_token
from dovetail.cost.memory.process import generation_memory
from dovetail.spec.family import Dial, dovetail_spec

CONTEXT = 4096  # tokens

MODELS = {
    "deepseek-v3": load_model("deepseek-v3"),
    "deepseek-v2-lite": load_model("deepseek-v2-lite"),
    "qwen2.5-72b": load_model("qwen2.5-72b"),
    "width 512, two MTP modules": dovetail_spec(Dial(width=512, mtp_depth=2)),
}

print(f"{'model':<28}{'parameters':>18}{'active':>17}{'GFLOP/token':>13}{'cache B/token':>15}")
for name, spec in MODELS.items():
    counts = parameters(spec)
    flop = training_flop_per_token(spec, CONTEXT)
    cache = cache_bytes_per_token(spec)
    print(f"{name:<28}{counts.total:>18,}{counts.active:>17,}{flop / 1e9:>13,.2f}{cache:>15,}")

memory = generation_memory(MODELS["deepseek-v3"], batch=32, context=CONTEXT)
print(f"\ndeepseek-v3 in BF16, 32 sequences of {CONTEXT} tokens:")
print(f"weights {memory.weights / 1e9:,.1f} GB, cache {memory.cache / 1e9:,.1f} GB")
