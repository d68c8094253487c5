"""transformers' BLT computes with our ops what it computes without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from tiers import slow_unless
from torch import Tensor
from transformers_blt import CASES, batch, their_model

blt = pytest.importorskip("transformers.models.blt.modeling_blt")

from blt_kernels.integrations import _applied  # noqa: E402
from blt_kernels.integrations import transformers as integration  # noqa: E402
from blt_kernels.integrations._applied import Applied  # noqa: E402

TOLERANCE = 1e-5
MORE_CASES = {
    "eight_queries": {"cross_attn_k": 8, "encoder_config": {"cross_attn_k": 8}, "decoder_config": {"cross_attn_k": 8}},
    "short_window": {"local_attention_window_len": 3, "patcher_config": {"sliding_window": 2}},
}
CASES.update(MORE_CASES)
FAST = ("released", "all_encoder_layers", "grouped_heads", "hash_functions", "bytes")


@pytest.fixture(autouse=True)
def _stock_afterwards() -> Iterator[None]:
    """Every test leaves transformers as it was."""
    before = set(_applied._SLOTS)
    yield
    assert set(_applied._SLOTS) <= before


def logits_of(model: torch.nn.Module, tokens: Tensor, **arguments: object) -> Tensor:
    with torch.no_grad():
        return model(tokens, use_cache=False, **arguments).logits


def with_gradients(model: torch.nn.Module, tokens: Tensor, last: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Return logits up to a byte, and the gradients of a weighted sum of them."""
    logits = model(tokens, use_cache=False).logits[:, :last]
    weights = torch.linspace(-1, 1, logits.numel()).view_as(logits)
    trained = {name: x for name, x in model.named_parameters() if x.requires_grad}
    gradients = torch.autograd.grad((logits * weights).sum(), list(trained.values()), allow_unused=True)
    found = zip(trained, gradients, strict=True)
    return logits.detach(), {name: x for name, x in found if x is not None}


def assert_same(ours: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=TOLERANCE, atol=TOLERANCE)
    assert ours[1].keys() == theirs[1].keys()
    scale = max(float(x.abs().max()) for x in theirs[1].values())
    for name, gradient in theirs[1].items():
        worst = float((ours[1][name] - gradient).abs().max())
        assert worst <= TOLERANCE * max(scale, 1), f"{name}: {worst}"


@pytest.mark.parametrize("case", slow_unless(CASES, FAST))
def test_logits_and_gradients(case: str) -> None:
    model, tokens = their_model(case), batch()
    last = -1 if "long_patches" in case else None  # there transformers' last byte depends on the batch
    theirs = with_gradients(model, tokens, last)
    with integration.apply(model) as applied:
        ours = with_gradients(model, tokens, last)
    assert_same(ours, theirs)
    assert not applied.report().fell_back
    assert applied.report().replaced["BltSelfAttention.forward"] >= 5
    again = with_gradients(model, tokens, last)
    assert torch.equal(again[0], theirs[0])
    assert all(torch.equal(again[1][name], x) for name, x in theirs[1].items())


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 2])
def test_short_rows(rows: int, length: int) -> None:
    model, tokens = their_model("released"), batch(rows, length)
    theirs = with_gradients(model, tokens)
    with integration.apply(model):
        assert_same(with_gradients(model, tokens), theirs)


PARTS = ("attention", "cross_attention", "hash_embedding", "pooling", "patching", "norms")


@pytest.mark.parametrize("only", [True, False])
@pytest.mark.parametrize("part", slow_unless(PARTS, ["pooling"]))
def test_parts(part: str, only: bool) -> None:
    """Each part of the ops is exact by itself, and so are all the others."""
    model, tokens = their_model("released"), batch()
    theirs = with_gradients(model, tokens)
    with integration.apply(model, **{name: (name == part) == only for name in PARTS}):
        assert_same(with_gradients(model, tokens), theirs)


@pytest.mark.parametrize("before", [True, False])
def test_classes(before: bool) -> None:
    """Without a model, all are changed, whether they were made before or after."""
    tokens = batch()
    model = their_model("released")
    theirs = logits_of(model, tokens)
    with integration.apply() as applied:
        if before:
            model = their_model("released")
        calls = applied.report().replaced["BltModel.forward"]
        torch.testing.assert_close(logits_of(model, tokens), theirs, rtol=TOLERANCE, atol=TOLERANCE)
        assert applied.report().replaced["BltModel.forward"] == calls + 1
        embeds = [model.model.local_encoder, model.model.encoder_hash_tok_embedding, 1, [3, 4, 5, 6, 7, 8], 53]
        ours = blt.compute_hash_embeddings(tokens, *embeds)
    torch.testing.assert_close(ours, blt.compute_hash_embeddings(tokens, *embeds))
    assert torch.equal(logits_of(model, tokens), theirs)


def test_only_the_given_model_changes() -> None:
    model, other = their_model("released"), their_model("released")
    with integration.apply(model) as applied:
        logits_of(other, batch())
        assert set(applied.report().replaced.values()) == {0}
        model.model(batch(), use_cache=False)
        assert applied.report().replaced["BltModel.forward"] == 1


def test_applied_twice() -> None:
    model, tokens = their_model("released"), batch(1)
    theirs = logits_of(model, tokens)
    first, second = integration.apply(model), integration.apply(model)
    logits_of(model, tokens)
    assert first.report().replaced["BltModel.forward"] == 0
    assert second.report().replaced["BltModel.forward"] == 1
    second.undo()
    logits_of(model, tokens)
    assert first.report().replaced["BltModel.forward"] == 1
    first.undo()
    assert torch.equal(logits_of(model, tokens), theirs)
    assert not any("forward" in vars(module) for module in model.modules())


# --- padding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_compute_what_they_compute_alone(side: str) -> None:
    model = their_model("released")
    lengths, longest = (41, 7, 1, 23), 41
    tokens, mask = torch.zeros(4, longest, dtype=torch.int64), torch.zeros(4, longest, dtype=torch.int64)
    real = batch(4, longest)
    places = [slice(longest - n, None) if side == "left" else slice(0, n) for n in lengths]
    for row, (place, n) in enumerate(zip(places, lengths, strict=True)):
        tokens[row, place], mask[row, place] = real[row, :n], 1
    alone = [logits_of(model, real[row : row + 1, :n]) for row, n in enumerate(lengths)]
    with integration.apply(model) as applied:
        together = model(tokens, attention_mask=mask, use_cache=False, output_hidden_states=True)
    assert not applied.report().fell_back
    for row, (place, theirs) in enumerate(zip(places, alone, strict=True)):
        torch.testing.assert_close(together.logits[row, place], theirs[0], rtol=TOLERANCE, atol=TOLERANCE)
    states = model(real[1:2, :7], use_cache=False, output_hidden_states=True).hidden_states
    assert len(states) == len(together.hidden_states)
    for ours, theirs in zip(together.hidden_states, states, strict=True):
        torch.testing.assert_close(ours[1, places[1]], theirs[0], rtol=TOLERANCE, atol=TOLERANCE)


def test_a_row_of_a_batch_is_what_it_is_alone() -> None:
    model, tokens = their_model("released"), batch(3)
    with integration.apply(model):
        together = logits_of(model, tokens)
        for row in range(3):
            alone = logits_of(model, tokens[row : row + 1])
            torch.testing.assert_close(together[row], alone[0], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("case", ["released", "long_patches"])
def test_every_prefix_computes_what_the_whole_row_does(case: str) -> None:
    model, tokens = their_model(case), batch(2)
    with integration.apply(model):
        whole = logits_of(model, tokens)
        for end in range(1, tokens.shape[1]):
            prefix = logits_of(model, tokens[:, :end])
            torch.testing.assert_close(prefix[:, -1], whole[:, end - 1], rtol=TOLERANCE, atol=TOLERANCE)


def test_given_patch_lengths() -> None:
    """They need not begin with a patch of one byte, nor add up to the length of a row."""
    model, tokens = their_model("released"), batch(2, 9)
    lengths = torch.tensor([[1, 3, 5, 0], [2, 1, 3, 1]])
    theirs = model.model(tokens, patch_lengths=lengths, use_cache=False).last_hidden_state
    with integration.apply(model) as applied:
        ours = model.model(tokens, patch_lengths=lengths, use_cache=False).last_hidden_state
    assert not applied.report().fell_back
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


def test_given_embeddings() -> None:
    model = their_model("bytes")
    embeds = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    theirs = model(inputs_embeds=embeds, use_cache=False).logits
    with integration.apply(model):
        ours = model(inputs_embeds=embeds, use_cache=False).logits
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


# --- what is left to transformers -------------------------------------------------------------------------------------


def dense(tokens: Tensor) -> Tensor:
    return torch.ones(tokens.shape[1], tokens.shape[1]).tril().log()[None, None]


LEFT: dict[str, tuple[Callable[[Tensor], dict[str, object]], str]] = {
    "attentions": (lambda _: {"output_attentions": True}, "output_attentions"),
    "masks": (lambda tokens: {"attention_mask": dense(tokens)}, "not [B, S]"),
    "positions": (lambda tokens: {"position_ids": torch.arange(tokens.shape[1])[None]}, "position_ids"),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_is_left_to_transformers_is_reported(case: str) -> None:
    model, tokens = their_model("released"), batch(2)
    model.set_attn_implementation("eager")
    make, reason = LEFT[case]
    theirs = logits_of(model, tokens, **make(tokens))
    with integration.apply(model) as applied:
        assert torch.equal(logits_of(model, tokens, **make(tokens)), theirs) or case == "attentions"
        torch.testing.assert_close(logits_of(model, tokens, **make(tokens)), theirs, rtol=TOLERANCE, atol=TOLERANCE)
    assert [count for (name, why), count in applied.report().fell_back.items() if reason in why] == [2]


def test_dropout_is_left_to_transformers() -> None:
    model, tokens = their_model("released", encoder_config={"dropout": 0.3}).train(), batch(2)
    model.model.local_encoder.config.dropout = 0.3

    def run() -> Tensor:
        torch.manual_seed(3)
        return logits_of(model, tokens)

    theirs = run()
    with integration.apply(model) as applied:
        torch.testing.assert_close(run(), theirs, rtol=TOLERANCE, atol=TOLERANCE)
    assert applied.report().fell_back == {("attention", "dropout"): 1}


def hooked(model: torch.nn.Module) -> None:
    model.model.encoder_hash_tok_embedding.register_forward_hook(lambda module, args, output: output * 2)


def subclassed(model: torch.nn.Module) -> None:
    class Quantised(torch.nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * 0.5

    model.model.encoder_hash_tok_embedding.__class__ = Quantised


def padded(model: torch.nn.Module) -> None:
    model.model.local_encoder.embed_tokens.padding_idx = 70


@pytest.mark.parametrize("change", [hooked, subclassed, padded])
def test_tables_that_are_not_plain_are_read_by_their_modules(change: Callable[[torch.nn.Module], None]) -> None:
    model, tokens = their_model("hash_functions"), batch(2)
    change(model)
    theirs = with_gradients(model, tokens)
    with integration.apply(model) as applied:
        assert_same(with_gradients(model, tokens), theirs)
    assert [name for name, _ in applied.report().fell_back] == ["lookups of compute_hash_embeddings"]


# --- 16 bits ----------------------------------------------------------------------------------------------------------


def decisions(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """Return where the patches of a batch begin, as the encoder of the model is told."""
    seen: list[Tensor] = []
    encoder = model.model.local_encoder

    def note(module: torch.nn.Module, args: object, kwargs: dict) -> None:
        ids = kwargs["patch_ids"]
        seen.append(ids if isinstance(ids, Tensor) else ids.patch_ids.view(tokens.shape))

    handle = encoder.register_forward_pre_hook(note, with_kwargs=True)
    logits_of(model, tokens)
    handle.remove()
    return seen[0].diff(dim=-1) > 0


def test_decisions_of_bf16_are_those_of_transformers_on_request() -> None:
    model, tokens = their_model("released").bfloat16(), batch(8, 200)
    entropies = model.model.patcher(tokens)[0].unique()
    # The threshold rounds to an entropy that occurs, and lies below it.
    model.config.patching_threshold = entropies[entropies.numel() * 2 // 3].item() - 1e-4
    theirs = decisions(model, tokens)
    with integration.apply(model, compare="model"):
        assert torch.equal(decisions(model, tokens), theirs)
    with integration.apply(model):
        assert not torch.equal(decisions(model, tokens), theirs)


# --- errors and the interfaces of transformers ------------------------------------------------------------------------


def test_unknown_parameters_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self, input_ids=None, patch_lengths=None, brand_new=None): ...

    monkeypatch.setattr(blt.BltModel, "forward", forward)
    with pytest.raises(TypeError, match=r"forward of transformers \d.*expected .*past_key_values.*got .*brand_new"):
        integration.apply()


def test_errors() -> None:
    with pytest.raises(TypeError, match=r"model: expected a BLT .* got Linear"):
        integration.apply(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model: expected a BLT .* got str"):
        integration.apply("facebook/blt-1b")
    with pytest.raises(ValueError, match="compare: expected one of"):
        integration.apply(compare="bf16")
    for option in ("attention", "cross_attention", "hash_embedding", "pooling", "patching", "norms", "cache"):
        with pytest.raises(TypeError, match=f"^{option}: expected True or False, got 'yes'"):
            integration.apply(**{option: "yes"})


def test_methods_of_subclasses_are_not_replaced() -> None:
    class Attention(blt.BltSelfAttention):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model, tokens = their_model("released"), batch(2)
    theirs = logits_of(model, tokens)
    model.model.local_encoder.layers[0].self_attn.__class__ = Attention
    with pytest.raises(
        TypeError, match=r"model: .*BltSelfAttention.forward .* got Attention with a forward of its own"
    ):
        integration.apply(model)
    assert "forward" not in vars(model.model.patcher.layers[0].self_attn)
    with integration.apply() as applied:
        torch.testing.assert_close(logits_of(model, tokens), theirs, rtol=TOLERANCE, atol=TOLERANCE)
        with torch.no_grad():
            assert model(tokens).past_key_values is None
    assert "self_attn: expected the forward of BltSelfAttention" in str(applied.report())


@pytest.mark.parametrize("case", ["released", "no_window"])
def test_attention_implementation(case: str) -> None:
    """attn_implementation="blt_kernels" is enough for self-attention, and cross attention is left alone."""
    model, tokens = their_model(case), batch()
    theirs = with_gradients(model, tokens)
    padding = torch.ones_like(tokens)
    padding[1, :5] = 0
    masked = logits_of(model, tokens, attention_mask=padding)
    integration.apply(model).undo()
    model.set_attn_implementation("blt_kernels")
    assert_same(with_gradients(model, tokens), theirs)
    ours = logits_of(model, tokens, attention_mask=padding)
    torch.testing.assert_close(ours, masked, rtol=TOLERANCE, atol=TOLERANCE)


def test_report() -> None:
    model = their_model("released")
    with integration.apply(model) as applied:
        logits_of(model, batch(1))
    assert isinstance(applied, Applied)
    assert "BltModel.forward: 1 call" in str(applied.report())


def test_the_table_of_doctor_is_what_is_replaced() -> None:
    with integration.apply(norms=True) as applied:
        assert set(applied.report().replaced) == {*integration.REPLACES, "BltCache"}  # counts what the cache computed
