"""Layers of language models taken out: their numbers follow, so that caches and configurations stay right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import torchtrim as tt
from torchtrim.edits.layer_numbers import layer_numbers


def gpt2() -> nn.Module:
    torch.manual_seed(1)
    config = transformers.GPT2Config(n_embd=32, n_layer=5, n_head=2, n_positions=48, vocab_size=64)
    return transformers.GPT2LMHeadModel(config).eval()


def llama() -> nn.Module:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=2, vocab_size=64
    )
    return transformers.LlamaForCausalLM(config).eval()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 64, (3, 7))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def written(net: Any, x: dict[str, torch.Tensor], *, cache: bool) -> torch.Tensor:
    with torch.no_grad():
        found = net.generate(**x, max_new_tokens=9, do_sample=False, pad_token_id=0, use_cache=cache)
    assert isinstance(found, torch.Tensor)
    return found


@pytest.mark.parametrize(("make", "stack"), [(gpt2, "transformer.h"), (llama, "model.layers")])
def test_a_causal_model_generates_with_its_cache_what_it_does_without(make: Any, stack: str, tmp_path: Path) -> None:
    """The first layer, which tells how long a cache is, and one from the middle."""
    net, x = make(), batch()
    assert layer_numbers(net) == {stack: (0, 1, 2, 3, 4)}
    short: Any = tt.remove(net, x, [f"{stack}.0", f"{stack}.3"])
    assert layer_numbers(short) == {stack: (0, 1, 2)}
    assert layer_numbers(net) == {stack: (0, 1, 2, 3, 4)}
    assert (net.config.num_hidden_layers, short.config.num_hidden_layers) == (5, 3)
    assert torch.equal(written(short, x, cache=True), written(short, x, cache=False))
    with torch.no_grad():
        cache = short(**x).past_key_values
    assert cache.get_seq_length() == 7
    assert sum(layer.is_initialized for layer in cache.layers) == 3
    tt.save(short, tmp_path / "short.trim")
    again = tt.load(tmp_path / "short.trim", model=make())
    assert layer_numbers(again) == {stack: (0, 1, 2)}
    assert torch.equal(written(again, x, cache=True), written(short, x, cache=True))


def test_kinds_of_layers_go_with_them() -> None:
    torch.manual_seed(1)
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
    config = transformers.Qwen2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64, use_sliding_window=True, sliding_window=4, layer_types=list(kinds),
    )  # fmt: skip
    net, x = transformers.Qwen2ForCausalLM(config).eval(), batch()
    short: Any = tt.remove(net, x, ["model.layers.2"])
    assert short.config.layer_types == [kinds[place] for place in (0, 1, 3, 4)]
    assert short.model.config is short.config
    assert net.config.layer_types == kinds
    assert torch.equal(written(short, x, cache=True), written(short, x, cache=False))


def test_two_stacks_are_numbered_each_by_itself() -> None:
    torch.manual_seed(1)
    config = transformers.BartConfig(
        d_model=16, encoder_layers=3, decoder_layers=4, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=64, max_position_embeddings=32,
    )  # fmt: skip
    net: Any = transformers.BartModel(config).eval()
    ids = torch.randint(3, 64, (3, 6))
    x = {"input_ids": ids, "decoder_input_ids": ids, "use_cache": False}
    before = layer_numbers(net)
    tensors = {name: value for name, value in x.items() if isinstance(value, torch.Tensor)}
    short = tt.remove(net, tensors, ["decoder.layers.1"])
    after = layer_numbers(short)
    assert after["decoder.layers"] == (0, 1, 2)
    assert {stack: numbers for stack, numbers in after.items() if stack != "decoder.layers"} == {
        stack: numbers for stack, numbers in before.items() if stack != "decoder.layers"
    }
    assert short.config.decoder_layers == 4  # what its configuration counts is not told apart


def test_numbers_with_gaps_are_left_as_they_are() -> None:
    class Layer(nn.Linear):
        def __init__(self, number: int) -> None:
            super().__init__(4, 4)
            self.layer_idx = number

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + super().forward(x)

    net = nn.Sequential(*(Layer(number) for number in (0, 2, 5, 7)))
    short = tt.remove(net, torch.randn(2, 4), ["1"])
    assert [layer.layer_idx for layer in short] == [0, 5, 7]
    whole = nn.Sequential(*(Layer(number) for number in (1, 2, 3)))
    assert [layer.layer_idx for layer in tt.remove(whole, torch.randn(2, 4), ["1"])] == [1, 2]
