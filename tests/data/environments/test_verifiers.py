"""Environments of the real package, in their own processes: what they hear, what they are told, and what they are worth."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from rlkit.compose import compose
from rlkit.controller.local import InProcessCluster
from rlkit.controller.loop import train
from rlkit.data.environments import verifiers
from rlkit.data.environments.pool import EnvironmentPool, Failure
from rlkit.data.environments.protocol import Step
from rlkit.data.prompts import load_prompts
from rlkit.data.sources import read
from rlkit.errors import ConfigError, ResourceError
from rlkit.settings import Role, VerifiersData, VerifiersEnvironment
from rlkit.types import RewardStatus

ENVIRONMENTS = '''
import datetime
import verifiers as vf
from datasets import Dataset

SUMS = [{"question": "1+2", "answer": "3", "info": {"level": 1}}, {"question": "1+5", "answer": "6", "info": {"level": 2}}]

def rows(rows=SUMS): return Dataset.from_list(rows)

def right(completion, answer): return float(completion[-1]["content"] == answer)

def short(completion, **kwargs): return 1 / len(completion[-1]["content"])  # of an empty answer: an error

def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: one
        b: the other
    """
    if a == 13: raise LookupError("no luck")
    return a + b

def single(**kwargs):
    rubric = vf.Rubric(funcs=[right, short], weights=[1.0, 0.5])
    return vf.SingleTurnEnv(dataset=rows(), system_prompt="Be brief.", rubric=rubric, **kwargs)

class Counting(vf.MultiTurnEnv):
    """Counts the turns; 'error' fails as the package means it, 'crash' as a bug would, 'done' ends it."""
    async def setup_state(self, state):
        state["heard"] = []
        return state
    async def env_response(self, messages, state, **kwargs):
        said = messages[-1]["content"]
        state["heard"].append(said)
        if said == "error": raise vf.InfraError from ConnectionError("no route")
        if said == "crash": return {}["nothing"]
        if said == "rewrite": messages[0] = {"role": "user", "content": "something else"}
        if said == "nothing": return []
        if said == "picture": return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
        if said == "assistant": return [{"role": "assistant", "content": "I"}]
        if said == "tools": state["oai_tools"] = [{"type": "function"}]
        if said == "two": return [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "user", "content": "b"}]
        return [{"role": "user", "content": f"{said}: turn {len(state['heard'])}"}]
    @vf.stop
    async def finished(self, state):
        return bool(state["trajectory"]) and state["trajectory"][-1]["completion"][-1]["content"] == "done"
    @vf.cleanup
    async def tidy(self, state):
        self.tidied = getattr(self, "tidied", 0) + 1

def counting(max_turns=4):
    def heard(state): return len(state["heard"]) + len(state["trajectory"]) / 8
    def cut(state): return 100.0 * bool(state["is_truncated"])
    return Counting(dataset=rows(), max_turns=max_turns, rubric=vf.Rubric(funcs=[heard, cut]))

def tidying():
    def tidied(state): return float(made.tidied)
    made = Counting(dataset=rows(), rubric=vf.Rubric(funcs=[tidied]))
    return made

class Opening(Counting):
    async def setup_state(self, state):
        state["heard"] = []
        extra = {"role": "user", "content": f"level {state['info']['level']}"}
        state["prompt"] = [*state["prompt"], extra] if state["info"]["level"] < 2 else [extra]
        return state

def opening(): return Opening(dataset=rows(), rubric=vf.Rubric(funcs=[right]))

def tools(): return vf.ToolEnv(dataset=rows(), tools=[add], rubric=vf.Rubric(funcs=[right]), system_prompt="Be brief.")

def text(prompts=("1+2=",), said=" no, {}:", per_character=0.0):
    class Text(vf.MultiTurnEnv):
        async def env_response(self, messages, state, **kwargs): return said.format(len(state["trajectory"]))
    def right(completion, answer): return float(completion.endswith(answer))
    prompts = Dataset.from_list([{"prompt": prompt, "answer": "3"} for prompt in prompts])
    def characters(completion): return len(completion)
    rubric = vf.Rubric(funcs=[right, characters], weights=[1.0, per_character])
    return Text(dataset=prompts, max_turns=2, message_type="completion", rubric=rubric)

def asks_twice():
    class Twice(vf.SingleTurnEnv):
        async def get_model_response(self, state, prompt, **kwargs):
            import asyncio
            both = [vf.SingleTurnEnv.get_model_response(self, state, prompt) for _ in range(2)]
            return (await asyncio.gather(*both))[0]
    return Twice(dataset=rows(), rubric=vf.Rubric(funcs=[right]))

def asks_later():
    async def ask(state): return len((await state["client"].chat.completions.create(model="x", messages=[])).id)
    return vf.SingleTurnEnv(dataset=rows(), rubric=vf.Rubric(funcs=[ask]))

def metric_fails():
    def broken(completion): raise ValueError("never mind")
    return vf.SingleTurnEnv(dataset=rows(), rubric=vf.Rubric(funcs=[right, broken], weights=[1.0, 0.0]))

def not_a_number(): return vf.SingleTurnEnv(dataset=rows(), rubric=vf.Rubric(funcs=[lambda completion: float("nan")]))

def group():
    other = vf.SingleTurnEnv(dataset=rows(), eval_dataset=rows(SUMS[:1]), rubric=vf.Rubric(funcs=[right]))
    return vf.EnvGroup([single(), other], env_names=["a", "b"])

def compares(completions, **kwargs): return [0.0 for _ in completions]

def in_groups(): return vf.SingleTurnEnv(dataset=rows(), rubric=vf.Rubric(funcs=[right, compares]))

def no_function(): return vf.SingleTurnEnv(dataset=rows())

def no_weight(): return vf.SingleTurnEnv(dataset=rows(), rubric=vf.Rubric(funcs=[right], weights=[0.0]))

def dated():
    day = {"day": datetime.date(2020, 1, 1), "more": {"words": ["x"]}}
    made = [row | day for row in SUMS]
    print("loading")
    return vf.SingleTurnEnv(dataset=rows(made), eval_dataset=rows(made[:1]), rubric=vf.Rubric(funcs=[right]))

def only_eval(): return vf.SingleTurnEnv(eval_dataset=rows(), rubric=vf.Rubric(funcs=[right]))

def nothing(): return None
'''


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> Path:
    pytest.importorskip("verifiers")
    made = tmp_path_factory.mktemp("worlds")
    (made / "worlds.py").write_text(ENVIRONMENTS)
    return made


@pytest.fixture
def folder(worlds, monkeypatch) -> Path:
    """The current folder, with the environments in it."""
    monkeypatch.chdir(worlds)
    return worlds


@pytest.fixture(scope="module")
def open_pool(worlds):
    """A function (name, settings) -> pool, of which each is opened once: importing the package takes seconds."""
    pools: dict[str, EnvironmentPool] = {}

    def build(name: str, **settings) -> EnvironmentPool:
        key = f"{name} {settings}"
        if key not in pools:
            pools[key] = EnvironmentPool(VerifiersEnvironment(env_id=f"worlds.py:{name}", **settings), base_dir=worlds)
        return pools[key]

    yield build
    for pool in pools.values():
        pool.close()


def row(question: str = "1+2", answer: str = "3", **columns) -> dict:
    """As the data set of most of them has it."""
    prompt = [{"role": "user", "content": question}]
    return {"prompt": prompt, "answer": answer, "info": {"level": 1}, "example_id": 0, "task": "default"} | columns


def play(pool: EnvironmentPool, row: dict, *actions: str) -> list:
    """What follows each turn; an opening comes first where there is one."""
    [start] = pool.begin([(row, 0)])
    if isinstance(start, Failure):
        return [start]
    worker, opening = start
    steps = [pool.step([(worker, action)])[0] for action in actions]
    if not isinstance(steps[-1], Failure):
        pool.end(worker)
    return [opening, *steps] if opening else steps


def call(**arguments) -> str:
    return f"<tool_call>\n{json.dumps({'name': 'add', 'arguments': arguments})}\n</tool_call>"


def test_a_single_turn_is_scored_by_the_rubric(open_pool):
    pool = open_pool("single")
    assert play(pool, row(), "3") == [Step("", 1.5, done=True)]
    assert play(pool, row(), "seven") == [Step("", 0.5 / 5, done=True)]
    assert len(pool.worker_pids) == 1  # one episode after the other in a process


def test_several_turns_keep_their_state_and_episodes_side_by_side_their_own(open_pool):
    pool = open_pool("counting")
    workers = [worker for worker, _ in pool.begin([(row(), 0)] * 3)]
    for turn in range(1, 4):
        steps = pool.step([(worker, f"{number}") for number, worker in enumerate(workers)])
        assert [step.observation for step in steps] == [f"{number}: turn {turn}" for number in range(3)]
        assert not any(step.reward or step.done for step in steps)
    ended = pool.step([(workers[0], "on"), (workers[1], "done")])
    assert ended == [Step("", 3.5, done=True)] * 2  # by its own limit of four turns, and by its own condition
    assert play(pool, row(), "two", "done") == [Step("a\nb"), Step("", 1.25, done=True)]


def test_an_episode_that_is_cut_off_is_scored_as_one_whose_context_is_full(open_pool):
    pool = open_pool("counting")
    [(worker, _)] = pool.begin([(row(), 0)])
    pool.step([(worker, "one")])
    assert pool.cut([worker]) == [101.125]  # heard one turn, of one


def test_an_episode_that_nobody_plays_on_is_cleaned_up(open_pool):
    pool = open_pool("tidying")
    for _ in range(2):
        [(worker, _)] = pool.begin([(row(), 0)])
        pool.end(worker)
    assert play(pool, row(), "done") == [Step("", 3.0, done=True)]


def test_what_it_puts_behind_the_prompt_is_its_opening(open_pool):
    pool = open_pool("opening")
    assert play(pool, row(), "3") == ["level 1", Step("3: turn 1")]
    [failure] = play(pool, row(info={"level": 2}), "3")
    assert "it rewrites the prompt of its row" in failure.message


def test_tools_are_named_called_and_answered(open_pool):
    pool = open_pool("tools", observation_role=Role.tool)
    assert [tool["function"]["name"] for tool in pool.tools] == ["add"]
    two = f"First. {call(a=1, b=2)}{call(a=13, b=1)}"
    assert play(pool, row(), two, "3") == [Step("3\nno luck"), Step("", 1.0, done=True)]
    assert play(pool, row(), call(a="x", c=1), "4")[0].observation.startswith("add() got an unexpected keyword argument 'c'")
    assert play(pool, row(), "<tool_call>{}</tool_call>") == [Step("", 0.0, done=True)]  # no call: the answer


def test_plain_text_goes_on_where_the_prompt_ends(open_pool):
    assert play(open_pool("text"), row(prompt="1+2="), "4", "3") == [Step(" no, 1:"), Step("", 1.0, done=True)]


@pytest.mark.parametrize(
    ("name", "actions", "message"),
    [
        ("counting", ["on", "error"], "Unavailable: InfraError, caused by ConnectionError: no route"),
        ("counting", ["crash"], "KeyError: 'nothing' (worlds.py:"),
        ("counting", ["rewrite"], "it rewrites earlier turns"),
        ("counting", ["nothing"], "it asks for a turn right after another"),
        ("counting", ["picture"], "it shows something other than text"),
        ("counting", ["assistant"], "it speaks as assistant"),
        ("counting", ["tools"], "it offers this row other tools than the prompts name"),
        ("single", [""], "its reward function short raised ZeroDivisionError: division by zero (worlds.py:"),
        ("asks_twice", ["3"], "it asks for two turns of the policy at once"),
        ("asks_later", ["3"], "its reward function ask raised rlkit.data.environments.protocol.Unavailable: it asks for a turn"),
        ("not_a_number", ["3"], "its rubric gives nan for a reward"),
    ],
)
def test_what_fails_is_an_error_and_not_a_zero(open_pool, name, actions, message):
    failure = play(open_pool(name), row(), *actions)[-1]
    assert isinstance(failure, Failure)
    assert failure.status is RewardStatus.error
    assert message in failure.message


def test_a_metric_of_no_weight_may_fail(open_pool):
    assert play(open_pool("metric_fails"), row(), "3") == [Step("", 1.0, done=True)]


def test_a_group_scores_each_row_by_its_own_environment(open_pool):
    pool = open_pool("group")
    assert [play(pool, row(task=task), "3")[0].reward for task in "ab"] == [1.5, 1.0]
    [failure] = play(pool, row(task="c"), "3")
    assert "its rubric calls no reward function for the task c" in failure.message


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("tools", {}, r"environment.observation_role=user: .* has tools.* Write environment.observation_role=tool"),
        ("single", {"observation_role": Role.tool}, r"has no tools.* Write environment.observation_role=user"),
        ("in_groups", {}, "its reward function compares compares the samples of a group"),
        ("no_function", {}, "its rubric has no reward function"),
        ("no_weight", {}, "its rubric has no reward function"),
        ("single", {"options": {"score_rollouts": False}}, "it gives no reward. Load it with score_rollouts=true"),
        ("single", {"options": {"interleaved_rollouts": True}}, "it sends tokens to a server of its own"),
        ("tools", {"options": {"colour": 1}}, r"options=\{'colour': 1\}: loading it raised TypeError: .*colour"),
        ("nothing", {}, "makes a NoneType, not a verifiers.Environment"),
        ("gone", {}, "there is no gone in it"),
    ],
)
def test_what_cannot_be_played_is_refused_when_the_pool_opens(open_pool, name, settings, message):
    with pytest.raises(ConfigError, match=message):
        open_pool(name, **settings)


def test_an_installed_environment_is_known_by_its_name(folder, tmp_path, monkeypatch):
    (tmp_path / "sums_env.py").write_text(ENVIRONMENTS.replace("def single(", "def load_environment("))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    assert [each.values["task"] for each in read(VerifiersData(env_id="someone/sums-env")).train] == ["default"] * 2
    with EnvironmentPool(VerifiersEnvironment(env_id="someone/sums-env"), base_dir=folder) as pool:
        assert play(pool, row(), "3") == [Step("", 1.5, done=True)]


def test_an_environment_that_is_not_installed_is_refused(folder):
    message = "environment.env_id=no-such-env, .*: loading it raised ValueError: Could not import 'no-such-env' environment"
    with pytest.raises(ConfigError, match=message):
        EnvironmentPool(VerifiersEnvironment(env_id="no-such-env"), base_dir=folder)


SCRIPT = '''
"""The same turns, once from a server behind the package's own client, and once from a policy of rlkit."""
import asyncio, json, sys, threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from openai import AsyncOpenAI
from rlkit.data.environments.verifiers import Verifiers, _Client, load_environment

name, role, turns = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
heard = {"server": [], "rlkit": []}

class Server(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        heard["server"].append([body.get("messages", body.get("prompt")), body.get("tools")])
        answer = json.dumps(turns[len(heard["server"]) - 1]["served"]).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)
    def log_message(self, *_): ...

def result(state):
    trajectory = [[step["prompt"], step["completion"], step["is_truncated"]] for step in state["trajectory"]]
    return json.loads(json.dumps([state["completion"], state["reward"], state["metrics"], state["stop_condition"], trajectory]))

environment = load_environment("environment", f"worlds.py:{name}", {})
row = environment.dataset.to_list()[0]

async def native():
    client = AsyncOpenAI(base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key="none")
    state = await environment.run_rollout(row, client, "policy", {}, asyncio.Semaphore(1), asyncio.Semaphore(1), score=True)
    return result(state)

server = HTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
wanted = asyncio.run(native())

chat, text = _Client._ask_chat, _Client._ask_text
def listen(ask, key):
    async def listening(self, **call):
        heard["rlkit"].append(json.loads(json.dumps([call[key], call.get("tools")])))
        return await ask(self, **call)
    return listening
_Client._ask_chat, _Client._ask_text = listen(chat, "messages"), listen(text, "prompt")
played = Verifiers(env_id=f"worlds.py:{name}", options={}, observation_role=role)
played.reset(json.loads(json.dumps(row)), 0)
steps = [played.step(turn["said"]) for turn in turns]
print(json.dumps({"heard": heard, "wanted": wanted, "got": result(played._task.result()), "reward": steps[-1].reward}))
'''


ADD, ADD_13 = '{"a": 1, "b": 2}', '{"a": 13, "b": 1}'


def served(content: str | None, *calls: tuple[str, str]) -> dict:
    """What a chat server answers."""
    message: dict = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = [
            {"id": id, "type": "function", "function": {"name": "add", "arguments": arguments}} for id, arguments in calls
        ]
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if calls else "stop"}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "policy", "choices": [choice]}


def served_text(text: str) -> dict:
    choice = {"index": 0, "text": text, "finish_reason": "stop"}
    return {"id": "x", "object": "text_completion", "created": 0, "model": "policy", "choices": [choice]}


@pytest.mark.parametrize(
    ("name", "role", "turns"),
    [
        ("single", "user", [("<tool_call> 3", served("<tool_call> 3"))]),
        ("counting", "user", [(said, served(said)) for said in ("a", "two", "", "done")]),
        (
            "tools",
            "tool",
            [
                (f"Well. {call(a=1, b=2)}\n{call(a=13, b=1)}", served("Well. ", ("call-1-1", ADD), ("call-1-2", ADD_13))),
                (call(a="ä"), served(None, ("call-2-1", '{"a": "ä"}'))),
                ("3", served("3")),
            ],
        ),
        ("text", "user", [(said, served_text(said)) for said in ("4", "3")]),
    ],
)
def test_it_hears_exactly_what_it_would_hear_from_a_server(folder, name, role, turns):
    (folder / "script.py").write_text(SCRIPT)
    given = json.dumps([{"said": said, "served": answer} for said, answer in turns])
    command = [sys.executable, "-P", "script.py", name, role, given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert len(told["heard"]["server"]) == len(turns)
    assert told["heard"]["rlkit"] == told["heard"]["server"]
    assert told["got"] == told["wanted"]
    assert told["reward"] == told["wanted"][1]


@pytest.mark.parametrize(
    ("action", "parsed"),
    [
        ("no call", ("no call", [])),
        ('a <tool_call>{"name": "f", "arguments": {}}</tool_call> b', ("a ", [("f", "{}")])),
        ('<tool_call>{"name": "f", "arguments": {"x": "ä"}}', (None, [("f", '{"x": "ä"}')])),  # its end is missing
        ('<tool_call>{"name": "f"}</tool_call>', ('<tool_call>{"name": "f"}</tool_call>', [])),
        ('<tool_call>{"name": 1, "arguments": 2}</tool_call>', ('<tool_call>{"name": 1, "arguments": 2}</tool_call>', [])),
        ("<tool_call>[</tool_call>", ("<tool_call>[</tool_call>", [])),
    ],
)
def test_calls_are_read_as_a_server_reads_them(action, parsed):
    assert verifiers.parse(action) == parsed


def test_rows_are_those_of_the_environment_and_what_json_cannot_carry_is_left_out(folder, capfd):
    source = read(VerifiersData(env_id="worlds.py:dated"))
    assert source.held_out is not None
    assert [row.values for row in source.train] == [
        {
            "question": question,
            "answer": answer,
            "info": {"level": level},
            "more": {"words": ["x"]},
            "example_id": level - 1,
            "prompt": [{"role": "user", "content": question}],
            "task": "default",
        }
        for level, question, answer in ((1, "1+2", "3"), (2, "1+5", "6"))
    ]
    assert [row.values["example_id"] for row in source.held_out] == [0]
    assert "left out what JSON cannot carry: the columns day." in capfd.readouterr().err
    group = read(VerifiersData(env_id="worlds.py:group"))
    assert [(row.values["task"], row.values["example_id"]) for row in group.train] == [("a", 0), ("a", 1), ("b", 2), ("b", 3)]
    assert group.held_out is None  # one of its environments has none of its own
    with pytest.raises(ConfigError, match="it has rows to evaluate on, and none to train on"):
        read(VerifiersData(env_id="worlds.py:only_eval"))
    with pytest.raises(ConfigError, match=r"data.env_id=worlds.py:gone: there is no gone in it"):
        read(VerifiersData(env_id="worlds.py:gone"))


def test_prompts_name_the_tools(folder, open_pool, chat_tokenizer):
    tools = open_pool("tools", observation_role=Role.tool).tools
    settings = VerifiersData(env_id="worlds.py:tools", held_out_fraction=0)
    prompts = load_prompts(settings, chat_tokenizer(), max_prompt_tokens=2000, tools=tools).train
    assert [prompt.id for prompt in prompts] == ["0", "1"]
    assert '"name": "add"' in prompts[0].text
    assert "Be brief." in prompts[0].text


@pytest.mark.parametrize("version", ["0.4.0", "0.1.10", "0.1.8", None])
def test_other_versions_are_refused(monkeypatch, version):
    def installed(name: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", installed)
    said = (
        "is not installed" if version is None else f"verifiers {version} is installed, and rlkit runs environments of 0.1.9 alone"
    )
    with pytest.raises(ResourceError, match=rf"{said}. Install rlkit-llm\[verifiers\]"):
        read(VerifiersData(env_id="worlds.py:single"))


def test_the_settings_fit_together(in_folder):
    chosen = ["environment=verifiers", "environment.env_id=wordle", "reward=environment"]
    compose([*chosen, "data=verifiers", "data.env_id=wordle"])
    for data in ([], ["data=verifiers", "data.env_id=other"], ["data=verifiers", "data.env_id=wordle", "data.options={n: 1}"]):
        with pytest.raises(ConfigError, match="Write data=verifiers with the same env_id and options"):
            compose([*chosen, *data])
    with pytest.raises(ConfigError, match=r"environment.env_id=gone.py:make: there is no file gone.py"):
        compose([*chosen[::2], "environment.env_id=gone.py:make", "data=verifiers", "data.env_id=gone.py:make"])


@pytest.mark.slow
def test_it_trains(folder):
    chosen = ["cluster=inprocess", "rollout=transformers", "num_steps=2", "prompts_per_step=4", "group_size=4", "run_dir=run"]
    chosen += [
        "evaluation=none",
        "reward=environment",
        "max_prompt_tokens=8",
        "max_response_tokens=24",
        "environment.max_turn_tokens=4",
    ]
    options = {"said": "=", "per_character": 0.125, "prompts": [f"1+{number}=" for number in range(8)]}
    for group in ("environment", "data"):
        chosen += [f"{group}=verifiers", f"{group}.env_id=worlds.py:text"]
        chosen += [f"{group}.options.{name}={json.dumps(value)}" for name, value in options.items()]
    train(compose(chosen), InProcessCluster())
    steps = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    for step in steps:
        assert step["environment/turns_mean"] == 2
        assert step["reward/mean"] > 0
        assert step["policy/grad_norm"] > 0
        assert step["sync/probe_max"] <= 1e-4
