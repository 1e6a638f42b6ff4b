"""jaxserve's own clients against the real server: `chat`, `complete` and `bench serve`."""

from __future__ import annotations

import json
import subprocess

from tests.e2e.server import ROOT, command, environment


def run(*arguments: str, typed: str = "") -> str:
    done = subprocess.run(
        command(*arguments), cwd=ROOT, env=environment(), input=typed, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_complete_prints_the_greedy_answer(server):
    options = ("--temperature", "0", "--max-tokens", "6")
    assert run("complete", "--url", f"{server.url}/v1", *options, "-q", "The capital of France is").startswith(" Paris")


def test_chat_answers_what_is_typed(server):
    url = ("--url", f"{server.url}/v1", "--temperature", "0", "--max-tokens", "8")
    quick = run("chat", *url, "-q", "Name three rivers.").strip()
    assert quick
    assert quick in run("chat", *url, typed="Name three rivers.\n")


def test_bench_serve_measures_every_token(server, tmp_path):
    path = tmp_path / "result.json"
    load = ("--concurrency", "1,4", "--num-prompts", "4", "--input-len", "8:16", "--output-len", "4")
    table = run("bench", "serve", "--url", server.url, *load, "--json", str(path))
    assert "TTFT" in table
    results = json.loads(path.read_text())["results"]
    assert [(result["requests"], result["output_tokens"]) for result in results] == [(4, 16), (4, 16)]
