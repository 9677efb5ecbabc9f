"""Converts a checkpoint to GGUF with llama.cpp's own converter, for prompts of token ids.

    python _llama_convert.py LLAMA_CPP_SOURCE CHECKPOINT OUT.gguf bf16|f32 [mtp]

Of itself the converter refuses a tokenizer whose pre-tokenization it does not know by hash; the name given here is
never used, since only ids go in and out. It leaves MTP modules out of models of V3's architecture. With `mtp` they are
kept: nothing is skipped, the model has a block more for each, and their number is written down.
"""

import sys
from pathlib import Path
from typing import Any

SOURCE, CHECKPOINT, OUT = (Path(argument).resolve() for argument in sys.argv[1:4])
sys.path[:0] = [str(SOURCE), str(SOURCE / "gguf-py")]

import convert_hf_to_gguf  # noqa: E402
import gguf  # noqa: E402
from conversion.base import TextModel  # noqa: E402
from conversion.deepseek import DeepseekV2Model  # noqa: E402


def keep_mtp() -> None:
    make, describe = DeepseekV2Model.__init__, DeepseekV2Model.set_gguf_parameters

    def make_longer(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.block_count += self.hparams["num_nextn_predict_layers"]
        self.tensor_map = gguf.get_tensor_name_map(self.model_arch, self.block_count)

    def describe_all(self: Any) -> None:
        describe(self)
        self.gguf_writer.add_nextn_predict_layers(self.hparams["num_nextn_predict_layers"])

    DeepseekV2Model.skip_mtp = False
    DeepseekV2Model.__init__, DeepseekV2Model.set_gguf_parameters = make_longer, describe_all


TextModel.get_vocab_base_pre = lambda *_: "gpt-2"
if "mtp" in sys.argv[5:]:
    keep_mtp()
sys.argv = ["convert_hf_to_gguf.py", str(CHECKPOINT), "--outfile", str(OUT), "--outtype", sys.argv[4]]
convert_hf_to_gguf.main()
