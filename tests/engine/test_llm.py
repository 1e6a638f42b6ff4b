"""`LLM` drives a core in this process; what it shares with the server is tested there."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import jaxserve
from jaxserve import LLM, SamplingParams
from jaxserve.config import load_config
from jaxserve.errors import (
    ChatTemplateError,
    ConfigError,
    EngineDeadError,
    InvalidRequestError,
    QueueFullError,
    TokenizerError,
)
from jaxserve.outputs import FinishReason
from tests.engine.fake_core import CRASH, FAIL_ROW, FakeCore, expected_tokens

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"


class SmallQueueCore(FakeCore):
    """Takes two sequences at a time."""

    def add_request(self, request):
        if len(self._requests) >= 2:
            raise QueueFullError("the fake queue is full")
        super().add_request(request)


@pytest.fixture
def make_llm(make_config):
    def make(core_class=FakeCore, **values):
        config = make_config({"step_s": 0}, **values)
        return LLM(config=config, core=core_class(config, on_progress=lambda text: None))

    return make


@pytest.fixture
def llm(make_llm):
    with make_llm() as llm:
        yield llm


def test_answers_come_in_the_order_of_the_prompts(llm):
    params = [SamplingParams(max_tokens=20 - 5 * i) for i in range(3)]

    outputs = llm.generate(["ab", "cd", [1, 2]], params, use_tqdm=False)

    assert [output.prompt for output in outputs] == ["ab", "cd", None]
    assert [len(output.outputs[0].token_ids) for output in outputs] == [20, 15, 10]
    assert outputs[0].outputs[0].text == "ab" * 10
    assert all(output.finished for output in outputs)


def test_one_prompt_may_come_without_a_list(llm):
    params = SamplingParams(max_tokens=2)

    assert llm.generate("ab", params, use_tqdm=False)[0].outputs[0].text == "ab"
    assert llm.generate([3, 4], params, use_tqdm=False)[0].outputs[0].token_ids == [3, 4]
    assert llm.generate([], params, use_tqdm=False) == []


def test_prompts_may_be_dicts_as_in_vllm(llm):
    params = SamplingParams(max_tokens=2)
    forms = [{"prompt": "ab"}, {"prompt_token_ids": [3, 4]}, "cd", (5, 6)]

    outputs = llm.generate(forms, params, use_tqdm=False)

    assert [output.prompt for output in outputs] == ["ab", None, "cd", None]
    assert [output.prompt_token_ids for output in outputs][1::2] == [[3, 4], [5, 6]]
    assert [llm.generate(form, params, use_tqdm=False)[0].prompt_token_ids for form in forms] == [
        output.prompt_token_ids for output in outputs
    ]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({"text": "ab"}, "must have the key 'prompt' or 'prompt_token_ids' and no other, got 'text'"),
        ([{"prompt": "ab", "multi_modal_data": {}}], "and no other, got 'prompt', 'multi_modal_data'"),
        ({"prompt": [1]}, "'prompt' of a prompt must be text, got list"),
        ({"prompt_token_ids": "ab"}, "'prompt_token_ids' of a prompt must be a list of token ids, got str"),
        (["ab", 5], "a prompt must be text, a list of token ids, .*, got int"),
        (5, "prompts must be text, .* or a list of such, got int"),
        (b"ab", "prompts must be text, .* or a list of such, got bytes"),
        (None, "prompts must be text, .* or a list of such, got NoneType"),
    ],
)
def test_a_prompt_of_another_form_is_refused(llm, prompts, message):
    with pytest.raises(InvalidRequestError, match=message):
        llm.generate(prompts, use_tqdm=False)


def test_n_and_stop_strings_work_as_on_the_server(llm):
    [output] = llm.generate("abc", SamplingParams(n=2, stop=["ca"]), use_tqdm=False)

    assert [completion.text for completion in output.outputs] == ["ab", "ab"]
    assert [completion.stop_reason for completion in output.outputs] == ["ca", "ca"]
    [output] = llm.generate("abc", SamplingParams(stop="ca"), use_tqdm=False)
    assert output.outputs[0].stop_reason == "ca"


def test_more_prompts_than_the_queue_takes_are_fed_as_it_empties(make_llm):
    with make_llm(SmallQueueCore) as llm:
        outputs = llm.generate([[i] for i in range(9)], SamplingParams(max_tokens=3), use_tqdm=False)

    assert [output.outputs[0].token_ids for output in outputs] == [expected_tokens([i], 3) for i in range(9)]


def test_a_request_that_never_fits_the_queue_is_refused(make_llm):
    with make_llm(SmallQueueCore) as llm, pytest.raises(QueueFullError):
        llm.generate("a", SamplingParams(n=3), use_tqdm=False)


def test_a_bad_prompt_stops_the_batch_before_it_starts(llm):
    with pytest.raises(InvalidRequestError, match="empty"):
        llm.generate(["ab", ""], SamplingParams(max_tokens=1), use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="2 prompts, but 1 sampling_params"):
        llm.generate(["a", "b"], [SamplingParams()], use_tqdm=False)


def test_a_row_that_fails_ends_alone(llm):
    bad, good = llm.generate([[FAIL_ROW], [1]], SamplingParams(max_tokens=6), use_tqdm=False)

    assert bad.outputs[0].finish_reason is FinishReason.ERROR
    assert good.outputs[0].token_ids == [1] * 6


def test_after_an_interruption_the_next_batch_runs_as_ever(llm):
    with pytest.raises(RuntimeError, match="scripted crash"):
        llm.generate([[CRASH], [1]], SamplingParams(max_tokens=6), use_tqdm=False)

    [output] = llm.generate("ab", SamplingParams(max_tokens=2), use_tqdm=False)
    assert output.outputs[0].text == "ab"


class InterruptedCore(FakeCore):
    """Ctrl-C is pressed in its second step."""

    def step(self):
        if self._num_steps == 1:
            signal.raise_signal(signal.SIGINT)
        return super().step()


def test_ctrl_c_lets_the_step_end_and_leaves_no_request(make_llm):
    with make_llm(InterruptedCore) as llm:
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["ab", "cd"], SamplingParams(max_tokens=6), use_tqdm=False)
        assert llm._engine.stats().num_steps == 2
        assert llm._engine.stats().num_running == 0

        [output] = llm.generate("ab", SamplingParams(max_tokens=2), use_tqdm=False)
    assert output.outputs[0].text == "ab"


def test_a_conversation_goes_through_the_template(llm):
    messages = [{"role": "user", "content": "hi"}]

    [output] = llm.chat(messages, SamplingParams(max_tokens=3), chat_template=TEMPLATE, use_tqdm=False)

    assert output.prompt == "<user>hi>"
    assert (
        len(llm.chat([messages, messages], SamplingParams(max_tokens=1), chat_template=TEMPLATE, use_tqdm=False)) == 2
    )


def test_a_bad_chat_template_is_named_before_the_engine_starts(make_config, tmp_path):
    config = make_config({}, chat_template=str(tmp_path / "absent.jinja"))
    with pytest.raises(TokenizerError, match="cannot read the chat template"):
        LLM(config=config)


def test_a_model_without_a_template_cannot_chat(llm):
    with pytest.raises(ChatTemplateError, match="no chat template"):
        llm.chat([{"role": "user", "content": "hi"}], use_tqdm=False)


def test_a_closed_llm_says_so(make_llm):
    llm = make_llm()
    llm.close()
    llm.close()

    with pytest.raises(EngineDeadError, match="closed"):
        llm.generate("a", use_tqdm=False)


def test_the_readmes_example_runs(llm, monkeypatch, capsys):
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(from jaxserve import LLM.*?)```", readme, re.DOTALL)

    def llm_with(**settings):
        load_config(None, settings)  # they exist
        return llm

    monkeypatch.setattr(jaxserve, "LLM", llm_with)
    exec(example, {})

    assert capsys.readouterr().out == "The capi\n"  # the fake repeats its prompt


def test_a_misspelt_setting_is_named():
    with pytest.raises(ConfigError, match="max_num_seq"):
        LLM(model="m", max_num_seq=8)


def test_the_public_names_import_without_jax():
    code = "import sys; from jaxserve import LLM, SamplingParams; print(*{'jax', 'transformers'} & {*sys.modules})"

    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "\n"
