"""Cached generation in transformers gives, token for token, what its forward without a cache gives."""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiers import slow_unless
from torch import Tensor
from transformers_blt import CASES, batch, their_model

transformers = pytest.importorskip("transformers")

from blt_kernels.integrations import transformers as integration  # noqa: E402
from blt_kernels.integrations._applied import Applied  # noqa: E402
from blt_kernels.integrations.transformers import BltCache, caching  # noqa: E402

NEW = 14  # bytes that each generation writes
FAST = ("released", "all_encoder_layers", "long_patches", "bytes")


def cached(model=None, compare: str = "fp32") -> Applied:
    """Put the cache alone under one model or all."""
    others = dict.fromkeys(("attention", "cross_attention", "hash_embedding", "pooling", "patching"), False)
    return integration.apply(model, **others, compare=compare)


@cache
def pair(case: str):
    """Return transformers' model, and one of the same parameters with the cache."""
    stock, ours = their_model(case), their_model(case)
    ours.applied = APPLIED[case] = cached(ours)
    return stock, ours


APPLIED: dict[str, Applied] = {}


@pytest.fixture(scope="module", autouse=True)
def _stock_afterwards() -> Iterator[None]:
    yield
    for applied in APPLIED.values():
        applied.undo()
    pair.cache_clear()


def prompt(rows: int = 1, length: int = 11) -> Tensor:
    return batch(rows, length)


@torch.no_grad()
def whole(stock, ids: Tensor) -> Tensor:
    """Return stock logits without a cache.

    With `max_patch_length`, transformers does not know the decision after the last byte, so one more byte follows.
    """
    more = torch.cat([ids, ids[:, :1]], 1) if stock.config.max_patch_length else ids
    return stock(more, use_cache=False).logits[:, : ids.shape[1]]


def uncached(stock, ids: Tensor, **options) -> Tensor:
    """Generate without a cache."""
    return stock.generate(ids, max_new_tokens=NEW, use_cache=False, pad_token_id=0, **options)


def generated(ours, ids: Tensor, **options):
    before = ours.applied.report().replaced["BltCache"]
    out = ours.generate(ids, max_new_tokens=NEW, pad_token_id=0, **options)
    assert ours.applied.report().replaced["BltCache"] > before
    return out


@pytest.mark.parametrize("case", slow_unless(CASES, FAST))
def test_greedy(case: str) -> None:
    stock, ours = pair(case)
    ids = prompt()
    out = generated(ours, ids, do_sample=False, return_dict_in_generate=True, output_logits=True)
    for _ in range(NEW):
        ids = torch.cat([ids, whole(stock, ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(out.sequences, ids)
    expected = whole(stock, ids)[:, -NEW - 1 : -1]
    torch.testing.assert_close(torch.stack(out.logits, 1), expected, atol=1e-5, rtol=0)
    if stock.config.max_patch_length is None:
        assert torch.equal(out.sequences, uncached(stock, prompt(), do_sample=False))


MODES = {
    "beams": {"num_beams": 3, "do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 50},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "sampled_beams": {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
    "penalty": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
}


@pytest.mark.parametrize("mode", slow_unless(MODES, ("beams", "sampling")))
@pytest.mark.parametrize("rows", [1, 2])
def test_modes(mode: str, rows: int) -> None:
    stock, ours = pair("bytes" if rows > 1 else "released")  # stock batches of ragged patches depend on one another
    ids, out = prompt(rows), []
    for generate, model in ((uncached, stock), (generated, ours)):
        torch.manual_seed(3)
        out.append(generate(model, ids, **MODES[mode]))
    assert torch.equal(*out)


def test_the_report_counts_the_caches_that_generate_makes() -> None:
    ours, name = pair("released")[1], "BltForCausalLM._prepare_cache_for_generation"
    before = ours.applied.report().replaced[name]
    first = generated(ours, prompt(), return_dict_in_generate=True, do_sample=False)
    generated(ours, first.sequences, past_key_values=first.past_key_values, do_sample=False)  # brings a cache
    assert ours.applied.report().replaced[name] == before + 1


def test_prompt_lookup() -> None:
    stock, ours = pair("released")
    ids = prompt(1, 9).repeat(1, 3)
    assert torch.equal(generated(ours, ids, prompt_lookup_num_tokens=5, do_sample=False), uncached(stock, ids))


@pytest.mark.parametrize("other", ["released", "one_query"])
def test_assisted(other: str) -> None:
    """The assistant is the model itself, whose drafts are all accepted, or another one."""
    stock, ours = pair("released")
    assistant = copy.deepcopy(pair(other)[0])
    with cached(assistant):
        out = generated(ours, prompt(), assistant_model=assistant, do_sample=False)
    assert torch.equal(out, uncached(stock, prompt()))


def test_prefill_in_chunks() -> None:
    stock, ours = pair("released")
    out = generated(ours, prompt(1, 23), prefill_chunk_size=5, do_sample=False)
    assert torch.equal(out, uncached(stock, prompt(1, 23)))


def test_continuation() -> None:
    stock, ours = pair("released")
    first = generated(ours, prompt(), return_dict_in_generate=True, do_sample=False)
    cache, ids = first.past_key_values, torch.cat([first.sequences, prompt(1, 5)], 1)
    assert isinstance(cache, BltCache)
    assert cache.get_seq_length() == first.sequences.shape[1] - 1
    other = copy.deepcopy(cache)
    for held in (cache, other):
        assert torch.equal(generated(ours, ids, past_key_values=held, do_sample=False), uncached(stock, ids))


@torch.no_grad()
def test_left_padding_equals_alone() -> None:
    stock, ours = pair("released")
    texts = [batch(3, 30)[r, :n] for r, n in enumerate((17, 1, 6))]
    ids = torch.stack([torch.nn.functional.pad(text, (17 - len(text), 0)) for text in texts])
    mask = torch.stack([torch.arange(17) >= 17 - len(text) for text in texts]).long()
    out = generated(ours, ids, attention_mask=mask, do_sample=False)
    logits = ours(ids, attention_mask=mask).logits
    for text, row, own in zip(texts, out, logits, strict=True):
        assert torch.equal(row[17:], uncached(stock, text[None])[0, len(text) :])
        torch.testing.assert_close(own[17 - len(text) :], whole(stock, text[None])[0], atol=1e-5, rtol=0)
        assert not own[: 17 - len(text)].any()


def steps():
    """Draw what happens to a cache."""
    extend = st.tuples(st.just("extend"), st.integers(1, 9), st.integers(0, 2**16))
    crop = st.tuples(st.just("crop"), st.integers(-12, 12))
    numbers = st.lists(st.integers(0, 7), min_size=1, max_size=3)
    rows = st.tuples(st.sampled_from(["reorder_cache", "batch_select_indices"]), numbers)
    repeat = st.tuples(st.just("batch_repeat_interleave"), st.just(2))
    return st.lists(st.one_of(extend, extend, crop, rows, repeat), min_size=1, max_size=7)


@given(steps(), st.sampled_from(["released", "long_patches"]), st.sampled_from([0, 4, 64]))
@torch.no_grad()
def test_any_history_equals_whole_rows(history, case: str, undo: int) -> None:
    """After any history, with any columns masked, the next logits are those of each row alone."""
    stock, ours = pair(case)
    cache = BltCache(undo=undo)
    ids, mask = torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 0, dtype=torch.int64)
    for name, value, *seed in [*history, ("extend", 2, 0)]:
        if name == "extend":
            generator = torch.Generator().manual_seed(seed[0])
            new = torch.randint(4, 260, (len(ids), value), generator=generator)
            kept = (torch.rand(len(ids), value, generator=generator) < 0.7).long()
            kept[:, -1] = 1
            ids, mask = torch.cat([ids, new], 1), torch.cat([mask, kept], 1)
            logits = ours(new, attention_mask=mask, past_key_values=cache).logits
        elif name == "crop":
            cache.crop(value)
            keep = ids.shape[1] if value == 0 else value if value > 0 else max(0, ids.shape[1] + value)
            ids, mask = ids[:, :keep], mask[:, :keep]
        elif cache.state is not None:
            repeat = name == "batch_repeat_interleave"
            rows = torch.arange(len(ids)).repeat_interleave(2) if repeat else torch.tensor(value) % len(ids)
            if len(rows) <= 6:
                getattr(cache, name)(value if repeat else rows)
                ids, mask = ids[rows], mask[rows]
        assert cache.get_seq_length() == ids.shape[1]
    for row, kept, own in zip(ids, mask.bool(), logits, strict=True):
        torch.testing.assert_close(own[-1], whole(stock, row[kept][None])[0, -1], atol=1e-5, rtol=0)


@torch.no_grad()
def test_rows_are_computed_anew_where_crop_reaches_far_back() -> None:
    stock, ours = pair("released")
    ids, cache = batch(2, 300), BltCache(undo=0)
    for part in ids.split(50, 1):
        ours(part, past_key_values=cache)
    assert not any(cache.state._holds([40, 40]))
    cache.crop(-260)
    out = ours(ids[:, 40:44], past_key_values=cache).logits
    for row, own in zip(ids, out, strict=True):
        torch.testing.assert_close(own, whole(stock, row[None, :44])[0, 40:], atol=1e-5, rtol=0)


def test_long_prompts_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    stock, ours = pair("released")
    monkeypatch.setattr(caching, "_PART", 4)
    ids, mask = batch(2, 19), torch.ones(2, 19, dtype=torch.int64)
    mask[0, :6] = 0
    with torch.no_grad():
        out = ours(ids, attention_mask=mask, output_hidden_states=True)
        for row, first in ((0, 6), (1, 0)):
            expected = stock(ids[row : row + 1, first:], use_cache=False, output_hidden_states=True)
            got = [out.logits, *out.hidden_states]
            for own, theirs in zip(got, (expected.logits, *expected.hidden_states), strict=True):
                torch.testing.assert_close(own[row, first:], theirs[0], atol=1e-5, rtol=0)
                assert not own[row, :first].any()


@pytest.mark.parametrize("case", ["released", "bytes"])
@torch.no_grad()
def test_hidden_states_and_attentions(case: str) -> None:
    """They are those of a forward without a cache, for the new columns."""
    stock, ours = their_model(case, attn_implementation="eager"), their_model(case, attn_implementation="eager")
    ids, past = batch(1, 17), 9
    expected = stock(ids, use_cache=False, output_hidden_states=True, output_attentions=True)
    assert expected.attentions
    assert expected.hidden_states
    with cached(ours) as applied:
        first = ours(ids[:, :past], output_hidden_states=True)
        ours.config.output_hidden_states = True  # transformers also reads it from the configuration
        second = ours(ids[:, past:-1], past_key_values=first.past_key_values)
        last = ours(ids[:, -1:], past_key_values=first.past_key_values, output_attentions=True)
    assert first.attentions is None
    parts = zip(first.hidden_states, second.hidden_states, last.hidden_states, strict=True)
    for own, theirs in zip(parts, expected.hidden_states, strict=True):
        torch.testing.assert_close(torch.cat(own, 1), theirs, atol=1e-5, rtol=0)
    for own, theirs in zip(last.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(own, theirs[:, :, -1:], atol=1e-5, rtol=0)
    assert "output_attentions" in str(applied.report())


@torch.no_grad()
def test_what_forward_returns() -> None:
    stock, ours = pair("released")
    ids = batch(2, 12)
    out = ours(ids, labels=ids, logits_to_keep=0)
    torch.testing.assert_close(out.loss, stock(ids, labels=ids, use_cache=False).loss, atol=1e-5, rtol=0)
    assert torch.equal(ours(ids, logits_to_keep=3).logits, out.logits[:, -3:])
    assert torch.equal(ours(ids, logits_to_keep=torch.tensor([1, 5])).logits, out.logits[:, [1, 5]])
    assert torch.equal(ours(ids, return_dict=False)[0], out.logits)
    inner = ours.model(ids)
    assert torch.equal(ours.lm_head(inner.last_hidden_state), out.logits)
    assert isinstance(ours.model(ids, return_dict=False)[1], BltCache)
    assert isinstance(inner.past_key_values, BltCache)
    for positions in (torch.arange(12), torch.arange(12) + 100, torch.arange(12).expand(2, -1)):
        assert torch.equal(ours(ids, position_ids=positions).logits, out.logits)
    with torch.inference_mode():
        torch.testing.assert_close(ours(ids).logits, out.logits)


def gradients(model, ids: Tensor, **options):
    model.zero_grad()
    out = model(ids, labels=ids, **options)
    out.loss.backward()
    return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("training", [False, True])
def test_gradients_need_no_cache(training: bool) -> None:
    """`model(ids)` with defaults raises in transformers 5.23."""
    stock, ours = their_model("released"), their_model("released")
    ids = batch(2, 12)
    with pytest.raises(AttributeError, match="num_hidden_layers"):
        stock(ids)
    with cached(ours) as applied:
        out, own = gradients(ours.train(training), ids)
        assert out.past_key_values is None
        with torch.no_grad():
            assert isinstance(ours(ids).past_key_values, BltCache)
            assert ours(ids, use_cache=False).past_key_values is None
        ours.gradient_checkpointing_enable()
        checkpointed = gradients(ours, ids)[1]
    assert ("training" if training else "gradients") in str(applied.report())
    _, theirs = gradients(stock, ids, use_cache=False)
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[name], theirs[name]) for name in own)
    assert all(torch.equal(checkpointed[name], theirs[name]) for name in own)


def test_a_backward_pass_through_a_cache_is_refused() -> None:
    """Without that, only the head would have a gradient."""
    ours, ids = their_model("released"), batch(2, 12)
    with cached(ours):
        loss = ours(ids, labels=ids, use_cache=True).loss
        with pytest.raises(RuntimeError, match="use_cache: expected False for gradients"):
            loss.backward()


@torch.no_grad()
def test_parameters_are_shared() -> None:
    ours = their_model("released", tie_word_embeddings=True)
    ids = prompt(1, 9)
    with cached(ours):
        first = ours(ids)
        state = first.past_key_values.state
        shared = {p.data_ptr() for name, p in state.model.named_parameters() if name != "lm_head.weight"}
        assert shared == {p.data_ptr() for p in ours.parameters()}
        assert not any("blt" in name for name in ours.state_dict())
        assert ours.lm_head.weight is ours.model.local_encoder.embed_tokens.weight

        for p in ours.parameters():
            p.mul_(1.1)
        torch.testing.assert_close(ours(ids).logits, ours(ids, use_cache=False).logits, atol=1e-5, rtol=0)
        assert ours(ids).past_key_values.state.model is state.model

        layer = ours.model.local_decoder.layers[0].mlp
        layer.up_proj.weight = torch.nn.Parameter(layer.up_proj.weight * 2)
        with pytest.raises(ValueError, match="parameters that were replaced"):
            ours(ids, past_key_values=first.past_key_values)
        torch.testing.assert_close(ours(ids).logits, ours(ids, use_cache=False).logits, atol=1e-5, rtol=0)

        ours.config.patching_threshold = -1.0
        assert ours(ids).past_key_values.state.patch_starts == [list(range(10))]
        ours.double()
        assert ours(ids).past_key_values.state.dtype == torch.float64
        torch.testing.assert_close(ours(ids).logits, ours(ids, use_cache=False).logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_copies_have_their_own_cache() -> None:
    ours = their_model("released")
    with cached(ours):
        before = ours(prompt()).logits
        other = copy.deepcopy(ours)
        other.lm_head.weight.mul_(2)
        other.model.local_decoder.norm.weight.mul_(2)
        torch.testing.assert_close(other(prompt()).logits, 4 * before)
        assert torch.equal(ours(prompt()).logits, before)


def test_threads() -> None:
    """Threads that begin at once share a model: each gets its own tokens and hidden states."""
    model, lengths = their_model("released"), range(5, 41, 7)
    expected = [model(prompt(1, n), use_cache=False, output_hidden_states=True).hidden_states for n in lengths]
    at_once = Barrier(len(lengths))

    def run(length: int) -> list[tuple[Tensor, ...]]:
        at_once.wait()
        with torch.no_grad():
            outputs = [model(prompt(1, length), output_hidden_states=True) for _ in range(4)]
            model(prompt(1, 1), past_key_values=outputs[0].past_key_values)
        return [out.hidden_states for out in outputs]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with cached(model), ThreadPoolExecutor(len(lengths)) as pool:
            found = list(pool.map(run, lengths))
    finally:
        sys.setswitchinterval(interval)
    for states, ours in zip(expected, found, strict=True):
        for one in ours:
            torch.testing.assert_close(one[-1], states[-1], atol=1e-5, rtol=0)
            assert [x.shape for x in one] == [x.shape for x in ours[0]]


@torch.no_grad()
def test_adapters_run_and_tables_with_adapters_fall_back() -> None:
    peft = pytest.importorskip("peft")
    for targets, reason in ((["q_proj", "up_proj"], None), (["encoder_hash_tok_embedding"], "expected a plain module")):
        torch.manual_seed(0)
        options = {"target_modules": targets, "init_lora_weights": False}
        ours = peft.get_peft_model(their_model("released"), peft.LoraConfig(**options)).eval()
        with cached(ours) as applied:
            out = ours(input_ids=prompt())
            tokens = ours.generate(input_ids=prompt(), max_new_tokens=5, do_sample=False)
            expected = ours(input_ids=prompt(), use_cache=False)
            with ours.disable_adapter():
                plain = ours(input_ids=prompt())
        torch.testing.assert_close(out.logits, expected.logits, atol=1e-5, rtol=0)
        again = ours.generate(input_ids=prompt(), max_new_tokens=5, do_sample=False, use_cache=False)
        assert torch.equal(tokens, again)
        torch.testing.assert_close(plain.logits, whole(pair("released")[0], prompt()), atol=1e-5, rtol=0)
        assert (out.past_key_values is None) == (reason is not None)
        assert reason is None or reason in str(applied.report())


@torch.no_grad()
def test_what_cannot_be_shared_falls_back() -> None:
    def hook(module, args, out):
        calls.append(module)

    ids, calls = prompt(), []
    for change, reason in (
        (lambda m: m.model.local_decoder.layers[0].register_forward_hook(hook), "layers.0: expected no hooks"),
        (lambda m: m.model.local_decoder.layers[0].input_layernorm.bfloat16(), "parameters: expected one dtype"),
        (lambda m: setattr(m.config, "patch_size", None), "patch_size"),
        (lambda m: setattr(m.config.encoder_config, "dropout", 0.5) or m.train(), "dropout"),
    ):
        ours = their_model("released")
        with cached(ours) as applied:
            assert ours(ids).past_key_values is not None
            change(ours)
            assert ours(ids).past_key_values is None
            assert reason in str(applied.report())
            if reason != "dropout":
                options = {"max_new_tokens": 3, "do_sample": False}
                out = ours.generate(ids, **options), ours.generate(ids, use_cache=False, **options)
                assert torch.equal(*out)
            with pytest.raises(ValueError, match=reason):
                ours(ids, past_key_values=BltCache())
        assert reason != "layers.0: expected no hooks" or calls

    ours = their_model("released")
    with cached(ours) as applied:  # the cache calls a Linear with hooks
        ours.model.local_decoder.layers[0].mlp.up_proj.register_forward_hook(hook)
        calls.clear()
        assert ours(ids).past_key_values is not None
        assert calls
        embeds = ours.model.local_encoder.embed_tokens(ids)
        assert ours(inputs_embeds=embeds, patch_lengths=torch.tensor([[1, 10]])).past_key_values is None
        assert "inputs_embeds is given" in str(applied.report())


@torch.no_grad()
def test_errors() -> None:
    _, ours = pair("released")
    ids = prompt(2, 6)
    cache = ours(ids).past_key_values
    longer = torch.ones(2, 9, dtype=torch.int64)
    cases = [
        (TypeError, "expected a BltCache or None, got DynamicCache", {"past_key_values": transformers.DynamicCache()}),
        (ValueError, r"attention_mask: expected shape \[2, 9\]", {"attention_mask": torch.ones(2, 3)}),
        (ValueError, "to be masked as before", {"attention_mask": longer.index_fill(1, torch.tensor(2), 0)}),
        (ValueError, "input_ids: expected 2 rows", {"input_ids": ids[:1, :3]}),
        (ValueError, "position_ids that do not follow", {"position_ids": torch.tensor([6, 8, 9])}),
        (ValueError, "alphabet", {"input_ids": torch.full((2, 3), 260)}),
        (ValueError, "inputs_embeds is given", {"input_ids": None, "inputs_embeds": torch.zeros(2, 3, 32)}),
        (ValueError, "of another model", {"past_key_values": pair("one_query")[1](ids).past_key_values}),
    ]
    for kind, match, options in cases:
        with pytest.raises(kind, match=match):
            ours(**{"input_ids": ids[:, :3], "past_key_values": cache, **options})
        assert cache.get_seq_length() == 6
        assert cache.state.lengths == [6, 6]
    with pytest.raises(ValueError, match="cache_implementation: expected None"):
        ours.generate(ids, cache_implementation="static", max_new_tokens=2)
    embeds = ours.model.local_encoder.embed_tokens(ids)
    for use_cache in (None, False):
        with pytest.raises(ValueError, match=r"inputs_embeds: expected input_ids instead in generate\(\) of a BLT"):
            ours.generate(inputs_embeds=embeds, max_new_tokens=2, use_cache=use_cache)
    with pytest.raises(TypeError, match="needs a model under"):
        cache.update(ids, ids, 0)
    again = {"input_ids": ids[:, :3], "past_key_values": copy.deepcopy(cache)}
    torch.testing.assert_close(ours(**again).logits, ours(torch.cat([ids, ids[:, :3]], 1)).logits[:, 6:])


@torch.no_grad()
def test_methods() -> None:
    _, ours = pair("released")
    cache = BltCache()
    cache.crop(-3), cache.reorder_cache(torch.tensor([0])), cache.batch_repeat_interleave(2), cache.crop(2)
    assert (len(cache), cache.batch_size, cache.is_initialized, cache.get_max_cache_shape()) == (0, -1, False, -1)
    assert ours(prompt(2, 7), past_key_values=cache).past_key_values is cache
    assert (len(cache), cache.batch_size, cache.is_initialized, cache.get_mask_sizes(3)) == (7, 2, True, (10, 0))
    assert repr(cache) == "BltCache(rows=2, columns=7)"
    assert cache.is_croppable
    assert not cache.is_compileable
    cache.batch_select_indices(torch.tensor([False, True]))
    assert cache.batch_size == 1
    assert torch.equal(cache.columns(), prompt(2, 7)[1:])
    cache.crop(-99)
    assert cache.get_seq_length() == 0
    cache.reset()
    assert cache.state is None
    assert ours(prompt(3), past_key_values=cache).logits.shape[0] == 3
    with pytest.raises(ValueError, match="undo"):
        BltCache(undo=-1)


@torch.no_grad()
def test_compiled_forwards() -> None:
    """A compiled forward makes no cache by default, which would break its graph, and takes one that is given."""
    stock, ours = their_model("bytes"), their_model("bytes")
    ids = prompt(1, 8)
    with cached(ours):
        expected = torch._dynamo.explain(stock.model)(ids, use_cache=False).graph_break_count
        torch._dynamo.reset()
        assert torch._dynamo.explain(ours.model)(ids).graph_break_count <= expected
        torch._dynamo.reset()
        compiled = torch.compile(ours, backend="eager")
        assert compiled(ids).past_key_values is None
        cache = compiled(ids, use_cache=True).past_key_values
        out = compiled(ids, past_key_values=cache)
    torch.testing.assert_close(out.logits, whole(stock, torch.cat([ids, ids], 1))[:, 8:], atol=1e-5, rtol=0)
    torch._dynamo.reset()


def test_models_are_not_kept_alive() -> None:
    with cached(), torch.no_grad():
        ours = their_model("bytes")
        cache, alive = ours(prompt()).past_key_values, weakref.ref(ours.model)
        del ours
        gc.collect()
        assert alive() is None
        assert cache.get_seq_length() == prompt().shape[1]


def test_undo_leaves_nothing() -> None:
    ours = their_model("released")
    owners = ours, ours.model, type(ours), type(ours.model)
    before = [dict(vars(owner)) for owner in owners]
    for target in (ours, None):
        with cached(target), torch.no_grad():
            ours(prompt())
        assert [dict(vars(owner)) for owner in owners] == before
    with torch.no_grad(), pytest.raises(AttributeError, match="num_hidden_layers"):
        ours(prompt())


def test_comparison_in_the_dtype_of_the_model() -> None:
    """In bf16, transformers rounds an entropy of ln 260 = 5.5607 and a threshold of 5.56 to the same number."""
    stock = their_model("released").bfloat16()
    stock.config.patching_threshold = 5.56
    torch.nn.init.zeros_(stock.model.patcher.lm_head.weight)
    ids = prompt(1, 9)
    assert stock.model.patcher(ids, patch_size=4, threshold=5.56)[1].tolist() == [[1, 8]]
    for compare, starts in (("model", [0, 1]), ("fp32", list(range(10)))):
        ours = copy.deepcopy(stock)
        with cached(ours, compare=compare), torch.no_grad():
            assert ours(ids).past_key_values.state.patch_starts == [starts]


@torch.no_grad()
def test_bfloat16() -> None:
    """Rounding differs, so decisions and bytes are those of transformers but for near ties."""
    stock, ours = their_model("released").bfloat16(), their_model("released").bfloat16()
    entropy = stock.model.patcher(batch(1))[0][0, 1:].float().sort().values
    widest = entropy.diff()[10:-10].argmax() + 10
    for model in (stock, ours):
        model.config.patching_threshold = entropy[widest : widest + 2].mean().item()
    ids, options = batch(1), {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    with cached(ours, compare="model"):
        out = ours(ids)
        tokens = ours.generate(ids, **options)
    lengths = stock.model.patcher(ids, patch_size=4, threshold=stock.config.patching_threshold)[1]
    assert out.past_key_values.state.patch_starts == [(lengths.cumsum(1) - lengths)[0].tolist()]
    expected = whole(stock, ids)
    exact = copy.deepcopy(stock).float()
    exact = exact.lm_head(exact.model(ids, patch_lengths=lengths, use_cache=False).last_hidden_state)
    bound = 2 * (expected - exact).abs().max()
    assert (out.logits - exact).abs().max() <= bound
    logits = whole(stock, tokens)[0, -NEW - 1 : -1]
    chosen = logits.gather(1, tokens[0, -NEW:, None])[:, 0]
    assert (logits.amax(1) - chosen).max() <= 2 * bound


@pytest.mark.slow
def test_trainer(tmp_path) -> None:
    """`Trainer` trains and evaluates a model that would use a cache, and computes what it computes without."""
    pytest.importorskip("accelerate")
    ids = batch(8, 24)
    data = [{"input_ids": row, "labels": row} for row in ids]
    options = {"per_device_train_batch_size": 4, "num_train_epochs": 6, "learning_rate": 3e-3, "report_to": []}
    options |= {"save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no", "seed": 0}

    def train(use_cache: bool):
        model = their_model("released")
        arguments = transformers.TrainingArguments(str(tmp_path), use_cache=use_cache, **options)
        trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        return model, before, trainer.evaluate()["eval_loss"]

    theirs, *expected = train(use_cache=False)
    with cached() as applied:
        ours, before, after = train(use_cache=True)
        calls = applied.report().replaced["BltCache"]
    assert (before, after) == pytest.approx(expected, abs=1e-3)
    assert after < before - 0.3
    assert calls == 2  # both evaluations
    assert ("BltCache", "training") in applied.report().fell_back
    for name, value in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), value, atol=1e-3, rtol=0)
