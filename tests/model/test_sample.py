"""Samples with a key-value cache equal those of the plain forward pass, are drawn as requested, and
shown as they come.
"""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from slm.cli.sample import sample
from slm.data.tokenizer import Tokenizer
from slm.model.gpt import GPT
from slm.model.logits import softcapped
from slm.model.sample import KVCache, TextStream, draw, generate
from slm.recipe import pocket
from slm.train.optimizer import Optimizer
from tests.commands import slm
from tests.train.test_exactness import CASES, hyperparameters, random_model, rows
from tests.weights import Run, run_in

END = 99
"""The last id of TINY's vocabulary, which is padded to 128."""
BYTES = Tokenizer(tuple(bytes([value]) for value in range(256)))

pytestmark = pytest.mark.usefixtures("one_thread")


def greedy(model: GPT, prompt: list[int], tokens: int) -> list[int]:
    """Return the likeliest tokens, by the cache; no token ends them."""
    steps = generate(model, prompt, model.hp.vocab_size, [0], temperature=0, top_k=None)
    return [token for (token,) in islice(steps, tokens) if token is not None]


def plain_greedy(model: GPT, read: list[int], generated: list[int]) -> list[int]:
    """Return the plain forward pass's choice at the position of each generated token."""
    with torch.no_grad():
        return model(torch.tensor([read + generated]))[0, len(read) - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize(
    "cuts", [(*range(150, 512),), (*range(1, 512, 7),)], ids=["a prompt and tokens", "sevens"]
)
@pytest.mark.parametrize(("depth", "pattern"), CASES)
def test_logits_are_those_of_the_plain_forward_pass(
    depth: int, pattern: str, cuts: tuple[int, ...]
) -> None:
    """Up to the context's last position, however many tokens are read at once."""
    hp = hyperparameters(depth, pattern)
    model, (ids, _) = random_model(hp), rows(hp, 512)
    cache = KVCache(model, 2)
    read = [cache.read(part) for part in ids.tensor_split(cuts, dim=1)]
    assert cache.length == 512
    with torch.no_grad():
        logits = softcapped(torch.cat(read, dim=1), model.lm_head)
        torch.testing.assert_close(logits, model(ids), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("depth", "pattern"), CASES)
def test_greedy_tokens_are_those_of_the_plain_forward_pass(depth: int, pattern: str) -> None:
    hp = hyperparameters(depth, pattern)
    model, prompt = random_model(hp), rows(hp, 140)[0][0].tolist()
    generated = greedy(model, prompt, 200)
    assert len(generated) == 200
    assert generated == plain_greedy(model, prompt, generated)


@pytest.fixture(scope="module")
def trained() -> tuple[GPT, Tensor]:
    """Train a pocket model in float32 on this file for a little; return it, and the bytes of its
    first row.
    """
    hp = pocket(3, steps=60)
    tokens = 60 * 8 * (hp.sequence_length + 1)
    text = torch.tensor([BYTES.bos, *Path(__file__).read_bytes()])
    ids = text.repeat(-(-tokens // len(text)))[:tokens].view(60, 8, -1)
    model = GPT(hp)
    model.initialise(seed=1)
    optimizer = Optimizer(model)
    for step, batch in enumerate(ids):
        optimizer.zero_grad()
        (model.loss(batch[:, :-1], batch[:, 1:]) / batch[:, 1:].numel()).backward()
        optimizer.step(step)
    return model, ids[0, 0]


def test_a_trained_model_in_float32_generates_the_same_greedy_tokens(
    trained: tuple[GPT, Tensor],
) -> None:
    model, ids = trained
    for length in (1, 20, 100):
        prompt = ids[:length].tolist()
        generated = greedy(model, prompt, 128)
        assert len(generated) == 128 - length
        assert generated == plain_greedy(model, prompt, generated)


def test_a_sample_ends_with_its_document_or_with_the_context() -> None:
    hp = hyperparameters(2, "SSSL")
    model = random_model(hp)
    with torch.no_grad():
        # all ids are about equally likely: one sample in three reaches 100 tokens without an end
        model.lm_head *= 0.05
    steps = list(generate(model, [END] * (512 - 100), END, range(20), 1.0, None))
    samples = [[token for token in row if token is not None] for row in zip(*steps, strict=True)]
    assert len(steps) == 100
    assert {row[-1] == END for row in samples} == {True, False}
    for row in samples:
        assert END not in row[:-1]
        assert max(row) <= END
        assert len(row) == 100 or row[-1] == END


def test_a_seed_gives_the_same_sample_alone_and_with_other_seeds() -> None:
    model = random_model(hyperparameters(3, "SL"))

    def samples(*seeds: int) -> list[tuple[int | None, ...]]:
        return list(zip(*islice(generate(model, [1, 2, 3], END, seeds, 1.0, 20), 30), strict=False))

    one, two, three = samples(7, 8, 9)
    assert samples(8) == [two]
    assert len({one, two, three}) == 3


def test_probabilities_are_the_softmax_of_the_likeliest_logits_over_the_temperature() -> None:
    logits = torch.tensor([2.0, -1.0, 0.5, 1.0, 1.5])
    chances = torch.linspace(0, 1, 100_001)[:-1]
    drawn = draw(logits.expand(len(chances), -1), chances, temperature=0.7, top_k=3)
    shares = torch.bincount(drawn, minlength=5) / len(chances)
    expected = torch.zeros(5)
    expected[[0, 3, 4]] = torch.softmax(logits[[0, 3, 4]] / 0.7, dim=0)
    torch.testing.assert_close(shares, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("temperature", "top_k"), [(0.0, None), (1e-300, None), (1.0, 1), (100.0, 1)]
)
def test_without_temperature_or_choice_the_likeliest_is_drawn(
    temperature: float, top_k: int | None
) -> None:
    logits = torch.randn(50, 97, generator=torch.Generator().manual_seed(1))
    last = torch.full((50,), 1 - 2**-24)
    for chances in (torch.zeros(50), last):
        assert draw(logits, chances, temperature, top_k).tolist() == logits.argmax(-1).tolist()


def test_an_id_of_probability_zero_is_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    for chance in (0.0, 0.5, 1 - 2**-24):
        assert draw(logits, torch.tensor([chance]), 1.0, None).item() in (1, 2)


def test_a_character_appears_with_the_token_that_completes_it() -> None:
    text = TextStream(BYTES)
    pieces = [text.add(token) for token in "aé→😀".encode()]
    assert pieces == ["a", "", "é", "", "", "→", "", "", "", "😀"]
    assert text.close() == ""


def test_pieces_join_to_the_text_of_all_tokens_even_where_it_is_not_utf8() -> None:
    tokens = [*b"a\xe2\x86b\xffc", BYTES.bos + 1, *b"\xc3"]
    text = TextStream(BYTES)
    pieces = [text.add(token) for token in [*tokens, BYTES.bos, None]]
    assert "".join([*pieces, text.close()]) == bytes(t for t in tokens if t < BYTES.bos).decode(
        errors="replace"
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = run_in(tmp_path_factory.mktemp("home") / "runs")
    run.checkpoint(40)
    return run


def test_the_command_writes_the_likeliest_text_of_the_newest_checkpoint_and_says_so(
    run: Run,
) -> None:
    prompt = "def test_"
    result = slm(
        "sample", run.plan.run_id[:6], "--prompt", prompt, "--temperature", "0", home=run.home
    )
    assert result.returncode == 0, result.stderr
    assert "unfinished weights, after step 40 of 70" in result.stderr
    tokenizer = run.prepared.tokenizer
    read = [tokenizer.bos, *tokenizer.encode(prompt)]
    generated = [
        token
        for (token,) in generate(run.model, read, tokenizer.bos, [0], 0, None)
        if token is not None
    ]
    assert (
        result.stdout
        == prompt
        + tokenizer.decode([token for token in generated if token != tokenizer.bos])
        + "\n"
    )


def test_samples_are_printed_one_after_another_and_alike_as_json(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLM_HOME", str(run.home))
    (path,) = (run.folder / "checkpoints").iterdir()

    def printed(as_json: bool) -> str:
        sample(str(path), prompt="é", tokens=12, top_k=40, seed=5, samples=2, as_json=as_json)
        return capsys.readouterr().out

    document = json.loads(printed(as_json=True))
    assert [row["seed"] for row in document["samples"]] == [5, 6]
    assert all(row["ended"] == "tokens" and len(row["tokens"]) == 12 for row in document["samples"])
    written = "".join(f"--- seed {row['seed']}\né{row['text']}\n" for row in document["samples"])
    assert printed(as_json=False) == written


def test_a_prompt_that_fills_the_context_is_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLM_HOME", str(run.home))
    with pytest.raises(
        ValueError, match="--prompt: its 1,001 tokens fill the context of 128: shorten it"
    ):
        sample(run.plan.run_id, prompt="\t." * 500)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            ("--temperature", "-1"),
            "--temperature -1.0: 0 for the likeliest token, or a positive number",
        ),
        (
            ("--temperature", "nan"),
            "--temperature nan: 0 for the likeliest token, or a positive number",
        ),
        (("--tokens", "0"), "Invalid value for '--tokens': .*"),
        (("--top-k", "0"), "Invalid value for '--top-k': .*"),
        (("--prompt", "\udcff"), "--prompt: not UTF-8"),
    ],
)
def test_an_invalid_value_is_one_line(run: Run, option: tuple[str, str], message: str) -> None:
    result = slm("sample", run.plan.run_id, *option, home=run.home)
    assert result.returncode == 2
    assert result.stdout == ""
    assert re.fullmatch(f"slm: {message}", result.stderr.splitlines()[-1])
