"""The preference data of dpo.py and reward_model.py: forms of rows, chat templates, what is left out, what is refused."""

import json
import random

import pytest
from conftest import PAIRS, make_tokenizer, tiny_flags, write_rows
from transformers import AutoTokenizer, ByT5Tokenizer

import dpo
import reward_model
from dpo import UserError

DATE = "01 Dec 2026"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['role'] + ':' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
THINKING = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")


def chat(template=CHATML):
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "S"}


def row_of(chosen, rejected, *prompt, **columns):
    row = {"prompt": prompt[0]} if prompt else {}
    return {**row, "chosen": chosen, "rejected": rejected, **columns}


def texts_of(rows, tokenizer, max_length=999, script=dpo):
    """What is read of rows, decoded: (prompt, chosen, rejected) in dpo.py, whole answers in reward_model.py."""
    found = []
    if script is dpo:
        for pair in dpo.make_pairs(rows, tokenizer, max_length, DATE, rank=0):
            found.append([tokenizer.decode(ids) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)])
    else:
        for ranking in reward_model.make_rankings(rows, tokenizer, max_length, DATE, rank=0):
            found.append([tokenizer.decode(ids) for ids in ranking.answers])
    return found


def rendered(*turns):
    return "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)


OPEN = "<|im_start|>assistant\n"
FORMS = [
    row_of("x", "yz", "q"), row_of([assistant("x")], [assistant("yz")], [user("q")]),
    row_of([user("q"), assistant("x")], [user("q"), assistant("yz")]),
    row_of([user("q"), assistant("x")], [user("q "), assistant("yz")], "q"),  # the prompt stands in all of them
    row_of("x", "yz", [user("q")]), row_of([{**assistant("x"), "name": None}], [assistant("yz")], [user("q")]),
]  # fmt: skip


@pytest.mark.parametrize("row", FORMS)
def test_every_form_gives_the_prompt_once_and_whole_answers(row):
    prompt, chosen, rejected = texts_of([row], chat())[0]
    assert prompt == rendered(user("q")) + OPEN
    assert (chosen, rejected) == ("x<|im_end|>\n", "yz<|im_end|>\n")
    wholes = texts_of([row], chat(), script=reward_model)[0]
    assert wholes[0] == prompt + chosen and wholes[1].replace("q ", "q") == prompt + rejected


def test_longer_conversations():
    history = [SYSTEM, user("q"), assistant("a"), user("r")]
    expected = [[rendered(*history) + OPEN, "x<|im_end|>\n", "y<|im_end|>\n"]]
    for row in (
        row_of(history + [assistant("x")], history + [assistant("y")]),
        row_of(history + [assistant("x")], history + [assistant("y")], "r"),  # only the last turn of the user
        row_of([assistant("x")], [assistant("y")], history),
        row_of(history + [assistant("x")], history + [assistant("y")], history),
    ):
        assert texts_of([row], chat()) == expected


def test_texts_without_a_template_stay_texts_and_end_with_eos():
    tokenizer = chat(template=None)
    assert texts_of([row_of(" x", " yz", "q")], tokenizer) == [["q", " x</s>", " yz</s>"]]
    assert texts_of([row_of(" x</s>", " yz", "q")], tokenizer)[0][1] == " x</s>"
    assert texts_of([row_of(" x", " yz", "q")], tokenizer, script=reward_model) == [["q x</s>", "q yz</s>"]]


@pytest.mark.parametrize("template", [None, CHATML])
@pytest.mark.parametrize("texts, parts", [
    (("The sky is blue.", "The sky is green."), ("The sky is", " blue.</s>", " green.</s>")),
    (("abX", "abY"), ("ab", "X</s>", "Y</s>")),
    (("ab", "abc"), ("a", "b</s>", "bc</s>")),  # TRL leaves the shorter answer one character
])  # fmt: skip
def test_the_prompt_of_whole_texts_is_their_common_beginning(texts, parts, template):
    assert texts_of([row_of(*texts)], chat(template)) == [list(parts)]
    wholes = texts_of([row_of(*texts)], chat(template), script=reward_model)
    assert wholes == [[text + "</s>" for text in texts]]


def test_rankings_hold_any_number_of_answers_best_first():
    row = {"prompt": "q", "completions": ["x", "yy", "zzz"]}
    answers = texts_of([row], chat(None), script=reward_model)[0]
    assert answers == ["qx</s>", "qyy</s>", "qzzz</s>"]
    turns = {"prompt": [user("q")], "completions": [[assistant("x")], [assistant("y")]]}
    assert texts_of([turns], chat(), script=reward_model)[0][1] == rendered(user("q"), assistant("y"))


def test_a_thinking_template_opens_what_the_answers_do_not_have():
    prompt, chosen, _ = texts_of([row_of("x", "y", "q")], chat(THINKING))[0]
    assert prompt + chosen == rendered(user("q"), assistant("x")) and "<think>" not in prompt + chosen


def test_a_token_that_spans_the_seam_belongs_to_the_answers():
    tokenizer = make_tokenizer(list("0123456789+") + ["=", "=1"])
    tokenizer.backend_tokenizer.pre_tokenizer = None
    from tokenizers import Regex, pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("=1|."), "isolated")
    rows = [row_of("12", "3", "1+1="), row_of("3", "12", "1+1=")]
    assert texts_of(rows, tokenizer) == [["1+1", "=12<eos>", "=3<eos>"], ["1+1", "=3<eos>", "=12<eos>"]]


BAD = [  # rows that cannot be used, and words of the reason
    (row_of(None, "y", "q"), "no text|neither a text"), (row_of("x", "y", None), "no text|neither a text"),
    (row_of("", "y", "q"), "empty"), (row_of("x", " ", "q"), "empty"), (row_of("x", "y", ""), "empty"),
    (row_of([], [assistant("y")], "q"), "empty"), (row_of("x", "x", "q"), "same"), (row_of("x", 5, "q"), "text"),
    (row_of([{"role": "assistant"}], [assistant("y")], "q"), "no text as its content"),
    (row_of(["x"], [assistant("y")], "q"), "no role"),
    (row_of([user("p"), assistant("x")], [user("p"), assistant("y")], "q"), "another one than `prompt`"),
    (row_of([user("q"), assistant("x")], [user("q"), assistant("y")], [SYSTEM, user("q")]), "another one"),
    (row_of("x", "y", "q", label=0), "label is 0"),
]  # fmt: skip


@pytest.mark.parametrize("script", [dpo, reward_model])
@pytest.mark.parametrize("row, words", BAD)
def test_a_row_that_cannot_be_used_is_left_out_and_counted(script, row, words, capsys):
    good = row_of("x", "y", "q")
    if isinstance(row["chosen"], list):
        good = row_of([assistant("x")], [assistant("y")], "q")
    if "label" in row:
        good["label"] = 1
    assert len(texts_of([good, row, good, row, good], chat(), script=script)) == 3
    printed = capsys.readouterr().out
    assert printed.startswith("2 of 5 rows are left out; row 2: ")
    assert any(word in printed for word in words.split("|")), printed
    with pytest.raises(UserError, match="3 of 4 rows cannot be used; row 1: ") if script is dpo else pytest.raises(
        reward_model.UserError, match="3 of 4 rows cannot be used; row 1: "
    ):
        texts_of([row, row, row, good], chat(), script=script)


TRAINED = [  # answers with other turns than the assistant's: dpo.py would train them
    row_of([assistant("x"), user("r"), assistant("z")], [assistant("y")], [user("q")]),
    row_of([user("q"), assistant("x")], [user("q"), assistant("y"), user("r")]),
    row_of([SYSTEM, user("q"), assistant("x")], [user("q"), assistant("y")]),
    row_of([user("q"), assistant("x"), user("r"), assistant("z")], [user("q"), assistant("y"), user("s"), assistant("z")]),
]


@pytest.mark.parametrize("row", TRAINED)
def test_only_dpo_leaves_out_answers_with_turns_of_the_user(row, capsys):
    good = row_of([assistant("x")], [assistant("y")], [user("q")])
    assert len(texts_of([good, row], chat())) == 1 and "row 2" in capsys.readouterr().out
    whole = texts_of([good, row], chat(), script=reward_model)[1]
    prompt = row.get("prompt", [])
    assert whole == [rendered(*prompt, *row[name]) for name in ("chosen", "rejected")]


def test_a_row_that_the_template_refuses_ends_no_run(capsys):
    good, bad = row_of("x", "y", [user("q")]), row_of("x", "y", [user("q"), user("r")])
    for script in (dpo, reward_model):
        assert len(texts_of([good, bad, good], chat(GEMMA), script=script)) == 2
        assert "1 of 3 rows are left out; row 2: TemplateError('roles must alternate')" in capsys.readouterr().out


def test_turns_need_a_chat_template():
    with pytest.raises(UserError, match="turns need a model with a chat template"):
        texts_of([row_of([assistant("x")], [assistant("y")], [user("q")])], chat(None))


def test_answers_beyond_max_length_are_cut_in_dpo_and_left_out_in_the_reward_model(capsys):
    rows = [row_of("x" * 9, "y", "q"), row_of("x", "y", "q"), row_of("x", "y", "q")]
    assert texts_of(rows, chat(None), max_length=5)[0] == ["q", "xxxx", "y</s>"]
    assert "1 of 3 pairs have an answer that is cut at 5 tokens" in capsys.readouterr().out
    assert len(texts_of(rows, chat(None), max_length=5, script=reward_model)) == 2
    assert "row 1: an answer ends after --max-length 5" in capsys.readouterr().out
    long = [row_of("x", "y", "q" * 5), row_of("xxxxa", "xxxxb", "q"), *rows[1:]]
    assert len(texts_of(long, chat(None), max_length=5)) == 2
    assert "2 of 4 rows are left out; row 1: its prompt has" in capsys.readouterr().out


def test_tools_and_chat_template_kwargs_go_to_the_template():
    template = CHATML + "{{ tools }}{{ flavor }}"
    row = row_of("x", "y", "q", tools='[{"name": "f"}]', chat_template_kwargs={"flavor": "sweet"})
    assert texts_of([row], chat(template))[0][1].endswith("[{'name': 'f'}]sweet")
    assert texts_of([{**row, "tools": [{"name": "g"}]}], chat(template))[0][1].endswith("[{'name': 'g'}]sweet")


@pytest.mark.parametrize("script", [dpo, reward_model])
def test_a_prompt_in_another_column_is_refused_by_name_and_unread_columns_are_printed(script, capsys):
    used = ("prompt", "chosen", "rejected")
    for name in ("question", "query", "instruction", "input", "context", "system", "trajectory", "labels"):
        with pytest.raises(script.UserError, match=f"`{name}` but no `prompt`.*Its columns are"):
            script.check_columns([row_of("It is 4", "It is 5", **{name: "2+2?"})], used, rank=0)
        script.check_columns([row_of("It is 4", "It is 5", "2+2?", **{name: "2+2?"})], used, rank=0)
        assert capsys.readouterr().out == f"columns that are not used: ['{name}']\n"
    script.check_columns([row_of("It is 4", "It is 5", labels=1)], used, rank=0)


def test_whole_runs_read_and_refuse_columns(tmp_path, model_folder, capsys):
    for script, name in ((dpo, "dpo"), (reward_model, "reward_model")):
        flags = {**tiny_flags(name, tmp_path, model_folder), "max_steps": 1}
        rows = [{**row, "question": "2+2?", "score": 3.5} for row in PAIRS]
        script.main(script.Args(**{**flags, "dataset_name": write_rows(tmp_path / "a.jsonl", rows)}))
        assert "columns that are not used: ['question', 'score']" in capsys.readouterr().out
        for row in rows:
            del row["prompt"]
        with pytest.raises(script.UserError, match="`question` but no `prompt`"):
            script.main(script.Args(**{**flags, "dataset_name": write_rows(tmp_path / "b.jsonl", rows)}))
        rows = write_rows(tmp_path / "c.jsonl", [{**row, "margin": 0.5} for row in PAIRS])
        if script is reward_model:
            script.main(script.Args(**{**flags, "dataset_name": rows}))
        else:
            with pytest.raises(UserError, match="`margin`"):
                script.main(script.Args(**{**flags, "dataset_name": rows}))


def trl_rows():
    """Seven kinds of rows whose prompts and answers TRL reads too."""
    history = [user("Hi"), assistant("Hello."), user("And?")]
    tail = [[assistant("Good, thanks.")], [assistant("Bad.")]]
    yield "prompt", row_of(*tail, [user("How are you?")])
    yield "system", row_of(*tail, [SYSTEM, user("How are you?")])
    yield "history", row_of(*tail, history)
    yield "implicit", row_of([user("How are you?")] + tail[0], [user("How are you?")] + tail[1])
    yield "implicit history", row_of(history + tail[0], history + tail[1])
    yield "implicit system", row_of([SYSTEM, user("Hi")] + tail[0], [SYSTEM, user("Hi")] + tail[1])
    yield "spaces", row_of([assistant(" Good ")], [assistant(" Bad ")], [user(" Hi ")])


def test_ids_are_trls(tmp_path):
    """Under all chat templates that TRL ships, and without a template."""
    trl = pytest.importorskip("trl")
    from pathlib import Path

    from datasets import Dataset
    from jinja2 import TemplateError
    from trl.data_utils import maybe_extract_prompt

    templates = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
    assert len(templates) > 30
    same = 0
    for path in templates:
        tokenizer = chat(path.read_text())
        for kind, row in trl_rows():
            extracted = maybe_extract_prompt(row)
            try:
                ids = []
                for turns in ([], extracted["chosen"], extracted["rejected"]):
                    ids.append(
                        tokenizer.apply_chat_template(
                            extracted["prompt"] + turns, add_generation_prompt=not turns, return_dict=False,
                            date_string=DATE,
                        )
                    )  # fmt: skip
            except (TemplateError, TypeError):
                continue  # TRL cannot read it either
            start = min(dpo.common_length(ids[0], ids[1]), dpo.common_length(ids[0], ids[2]))
            if not ids[1][start:] or ids[1] == ids[2]:  # TRL trains on nothing
                with pytest.raises(UserError):
                    dpo.make_pairs([row], tokenizer, 9999, DATE, rank=0)
                continue
            (pair,) = dpo.make_pairs([row], tokenizer, 9999, DATE, rank=0)
            assert pair.prompt_ids == ids[0][:start], (path.stem, kind)
            assert [pair.chosen_ids, pair.rejected_ids] == [ids[1][start:], ids[2][start:]], (path.stem, kind)
            (ranking,) = reward_model.make_rankings([row], tokenizer, 9999, DATE, rank=0)
            assert ranking.answers == ids[1:], (path.stem, kind)
            same += 1
    assert same > 200
    # Texts: as DPOTrainer itself prepares them.
    rng, tokenizer = random.Random(0), chat(None)
    texts = ["".join(rng.choices("ab ", k=rng.randint(2, 6))).strip() or "a" for _ in range(400)]
    rows = [{"chosen": "p" + a, "rejected": "p" + b} for a, b in zip(texts[::2], texts[1::2]) if a != b]
    for row in rows:
        theirs = maybe_extract_prompt(row)
        found = dpo.make_pairs([row], tokenizer, 999, DATE, rank=0)[0]
        assert [tokenizer.decode(x) for x in (found.prompt_ids, found.chosen_ids, found.rejected_ids)] == [
            theirs["prompt"], theirs["chosen"] + "</s>", theirs["rejected"] + "</s>"]  # fmt: skip
    assert Dataset.from_list(rows) is not None


def test_real_rows_are_read_whole(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/stories260K")
    rows = [json.loads(line) for line in (shared / "data/ultrafeedback_1k/train.jsonl").read_text().splitlines()[:50]]
    pairs = dpo.make_pairs(rows, tokenizer, 9999, DATE, rank=0)
    assert len(pairs) >= 45
    wholes = [(row["prompt"] + row["chosen"]).strip() for row in rows]
    for pair in pairs:
        ids = pair.prompt_ids + pair.chosen_ids
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() in wholes
