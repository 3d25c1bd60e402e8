"""Checkpoints from a hub: a server on this machine, asked by a child process that has only HF_ENDPOINT to know it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from llama_export.errors import LlamaExportError, UsageError
from llama_export.export.hub_errors import explain
from support.gguf_models import write_llama_gguf
from support.hf_models import write_llama_folder
from support.hub_server import TOKEN, Cut, HubServer, Repo

COMMIT = "c0ffee" + "0" * 34
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
CHILD = """
    import json, sys
    from functools import partial
    from pathlib import Path
    from llama_export.errors import LlamaExportError
    from llama_export.export import hub
    from llama_export.export.source import open_source
    from llama_export.progress import Silent
    hub._PAUSES = (0.01, 0.01, 0.01)
    options = json.loads(sys.argv[2])
    progress = Silent()
    progress.draws = options.pop("draws", False)
    progress.warn = partial(print, "told:", file=sys.stderr)
    if "chunk" in options:  # huggingface_hub writes what has come in pieces of 10 MB
        import huggingface_hub.constants
        huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = options.pop("chunk")
    if "cache_dir" in options:
        options["cache_dir"] = Path(options["cache_dir"])
    try:
        source = open_source(sys.argv[1], progress=progress, **options)
    except LlamaExportError as error:
        result = {"error": str(error), "exit_code": error.exit_code}
    else:
        weights = sum(float(abs(tensor.read(0, tensor.shape[0])).sum()) for tensor in source.tensors.values())
        result = {
            "model_id": source.model_id, "revision": source.revision, "kind": source.kind, "weights": weights,
            "files": sorted(source.files), "licence": source.licence,
        }
    print(json.dumps(result))
"""


@dataclass
class Client:
    """Runs `open_source` in a fresh process, since huggingface_hub reads its environment once, when imported."""

    home: Path
    endpoint: str

    def open(
        self, model: str = "org/tiny", *, environment: dict[str, str] | None = None, **options: Any
    ) -> dict[str, Any]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "XDG_"))}
        settings = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(self.home), "HOME": str(self.home)}
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(CHILD), model, json.dumps(options)],
            env=kept | settings | (environment or {}),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            cwd=self.home,
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        result: dict[str, Any] = json.loads(done.stdout) | {"stderr": done.stderr}
        return result


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a repository: a checkpoint in two shards, and files that nobody needs."""
    folder = write_llama_folder(tmp_path_factory.mktemp("hub") / "tiny", shards=2)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return files | {
        "README.md": b"---\nlicense: apache-2.0\ntags: [a]\n---\n# Tiny\n",
        "USE_POLICY.md": b"Do no harm.\n",
        "Notice": b"Random weights, all rights reserved.\n",
        "pytorch_model.bin": b"pickle",
        "original/model.safetensors": b"not wanted",
        "training_args.bin": b"pickle",
    }


@pytest.fixture
def hub(checkpoint: dict[str, bytes]) -> Iterator[HubServer]:
    with HubServer({"org/tiny": Repo(dict(checkpoint))}) as server:
        yield server


@pytest.fixture
def client(hub: HubServer, tmp_path: Path) -> Client:
    return Client(tmp_path, hub.endpoint)


def test_a_repository_becomes_a_source(hub: HubServer, client: Client, tmp_path: Path) -> None:
    result = client.open(cache_dir=str(tmp_path / "elsewhere"))
    assert result["model_id"] == "org/tiny"
    assert result["revision"] == COMMIT
    assert result["kind"] == "hub"
    assert result["licence"] == "apache-2.0"
    assert result["files"] == [
        "LICENSE",
        "Notice",
        "USE_POLICY.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (tmp_path / "elsewhere" / "models--org--tiny").is_dir()
    assert not (tmp_path / "hub").exists()
    fetched = {seen.path.rsplit("/", 1)[-1] for seen in hub.seen if seen.method == "GET" and "/resolve/" in seen.path}
    assert not fetched & {"pytorch_model.bin", "training_args.bin"}
    assert not any("original" in seen.path for seen in hub.seen)


def test_nothing_is_told_about_the_user(hub: HubServer, client: Client) -> None:
    client.open()
    known = ("/api/models/org/tiny/revision/", "/api/models/org/tiny/tree/", "/org/tiny/resolve/")
    assert [seen.path for seen in hub.seen if not seen.path.startswith(known)] == []
    assert all(seen.token is None for seen in hub.seen)


def test_the_same_weights_arrive(client: Client, tmp_path: Path) -> None:
    local = write_llama_folder(tmp_path / "local", shards=2)
    assert client.open()["weights"] == client.open(str(local))["weights"]


def test_a_second_build_downloads_nothing(hub: HubServer, client: Client) -> None:
    first = client.open()
    hub.seen.clear()
    second = client.open()
    assert second["revision"] == first["revision"]
    assert not [seen for seen in hub.seen if "/resolve/" in seen.path]


@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_a_revision_is_resolved_to_its_commit(client: Client, revision: str) -> None:
    assert client.open(revision=revision)["revision"] == COMMIT


def test_an_unknown_revision(client: Client) -> None:
    result = client.open(revision="v2")
    assert result["error"] == "org/tiny has no revision 'v2'; --revision takes a branch, a tag or a full commit hash."


def test_another_architecture_is_refused_before_its_weights_come(hub: HubServer, client: Client) -> None:
    config = json.dumps({"model_type": "mllama", "architectures": ["MllamaForConditionalGeneration"]})
    hub.repos["org/tiny"].files["config.json"] = config.encode()
    assert "Llama 3.2 Vision" in client.open()["error"]
    assert not [seen for seen in hub.seen if "safetensors" in seen.path]


def test_a_quantisation_that_is_not_read_is_refused_before_its_weights_come(hub: HubServer, client: Client) -> None:
    files = hub.repos["org/tiny"].files
    method = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    files["config.json"] = json.dumps(json.loads(files["config.json"]) | {"quantization_config": method}).encode()
    assert "'bitsandbytes', which stores numbers of a code book" in client.open()["error"]
    assert not [seen for seen in hub.seen if "safetensors" in seen.path]


def test_settings_of_old_gptq_repositories_come_along(hub: HubServer, client: Client) -> None:
    hub.repos["org/tiny"].files["quantize_config.json"] = json.dumps({"bits": 5}).encode()
    assert "GPTQ in 5 bits; 2, 3, 4, 8 are read" in client.open()["error"]
    assert not [seen for seen in hub.seen if "safetensors" in seen.path]


def test_weights_under_the_name_that_autogptq_gave_them(hub: HubServer, client: Client) -> None:
    files = hub.repos["org/tiny"].files
    for name in [name for name in files if "safetensors" in name]:
        del files[name]
    files["gptq_model-4bit-128g.safetensors"] = b"12345678"
    assert "gptq_model-4bit-128g.safetensors" in client.open()["error"]
    assert len(hub.gets("gptq_model-4bit-128g.safetensors")) == 1


@pytest.mark.parametrize("model", ["org/tinny", "gpt2"])
def test_an_unknown_repository(client: Client, model: str) -> None:
    for options in ({}, {"token": TOKEN}):
        error = client.open(model, **options)["error"]
        assert error.startswith(f"'{model}' is no folder here and {client.endpoint} knows no such repository")
        assert error.count(".") <= 5  # one sentence; the dots are those of the endpoint's address


def test_a_private_repository_needs_the_token(hub: HubServer, client: Client) -> None:
    hub.repos["org/tiny"].access = "private"
    assert "or it is private; check the name, and for a private one" in client.open()["error"]
    assert client.open(token=TOKEN)["kind"] == "hub"


@pytest.mark.parametrize("how", ["option", "HF_TOKEN"])
def test_a_gated_repository_needs_the_token(hub: HubServer, client: Client, how: str) -> None:
    hub.repos["org/tiny"].access = "gated"
    assert client.open()["error"].startswith(f"org/tiny is gated: accept its licence at {hub.endpoint}/org/tiny, then")
    hub.seen.clear()
    result = client.open(token=TOKEN) if how == "option" else client.open(environment={"HF_TOKEN": TOKEN})
    assert result["kind"] == "hub"
    assert {seen.token for seen in hub.seen} == {TOKEN}


def test_a_wrong_token_is_told_and_not_shown(client: Client) -> None:
    result = client.open(token="hf_wrong_secret")
    assert "refuses the access token (401)" in result["error"]
    assert "hf_wrong_secret" not in result["error"] + result["stderr"]


def test_a_forbidden_repository(hub: HubServer, client: Client) -> None:
    hub.repos["org/tiny"].access = "forbidden"
    assert "forbids access to org/tiny (403)" in client.open(token=TOKEN)["error"]


def test_a_hub_that_is_down(hub: HubServer, client: Client) -> None:
    hub.down = 503
    assert client.open()["error"] == f"{hub.endpoint} answered 503 for org/tiny; try again later."


@pytest.mark.parametrize("reset", [False, True])
def test_a_cut_connection_is_resumed(hub: HubServer, client: Client, reset: bool) -> None:
    hub.cuts[SHARDS[1]] = [Cut(60_000, reset=reset), Cut(60_000, reset=reset)]
    result = client.open(chunk=10_000)
    assert result["kind"] == "hub"
    assert hub.cuts[SHARDS[1]] == []
    assert len(hub.gets(SHARDS[0])) == 1
    starts = [seen.start for seen in hub.gets(SHARDS[1])]
    # What came before an early end is not asked for again; a reset loses it, but not the other files.
    assert starts == ([0, 0, 0] if reset else [0, 60_000, 120_000])


@pytest.mark.parametrize("draws", [False, True])
def test_bars_are_drawn_where_progress_draws(client: Client, draws: bool) -> None:
    stderr = client.open(draws=draws)["stderr"]
    assert ("model-00001" in stderr or "Fetching" in stderr) == draws
    assert draws or stderr == ""


def test_another_attempt_is_told_to_the_progress_and_nowhere_else(hub: HubServer, client: Client) -> None:
    hub.cuts[SHARDS[1]] = [Cut(100, reset=True)]
    stderr = client.open()["stderr"]
    assert stderr.startswith("told: The download stopped (")
    assert stderr.count("\n") == 1


def test_a_connection_that_breaks_again_and_again(hub: HubServer, client: Client) -> None:
    hub.cuts[SHARDS[1]] = [Cut(100, reset=True)] * 4
    error = client.open()["error"]
    assert error.startswith(f"The connection to {hub.endpoint} broke again and again while org/tiny was downloaded")
    assert "run the command again, complete files are kept" in error
    hub.seen.clear()
    assert client.open()["kind"] == "hub"
    assert [seen.path.rsplit("/", 1)[-1] for seen in hub.seen if seen.method == "GET" and "/resolve/" in seen.path] == [
        SHARDS[1]
    ]


@pytest.mark.parametrize("wanted", [False, True])
def test_plain_http_where_xet_cannot_be_reached(hub: HubServer, client: Client, wanted: bool) -> None:
    hub.repos["org/tiny"].xet = True
    hub.xet_storage = "http://127.0.0.1:9"
    quick = {
        "HF_HUB_DISABLE_XET": "0",
        "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1",
        "HF_XET_CLIENT_RETRY_BASE_DELAY": "9ms",
    }
    result = client.open(environment=quick if wanted else {})
    assert result["kind"] == "hub"
    asked = [seen.path for seen in hub.seen if "xet" in seen.path]
    if not wanted:
        assert asked == []
    elif importlib.util.find_spec("hf_xet"):
        assert asked
        assert "told: The download stopped (Task error" in result["stderr"]


def test_offline_with_and_without_the_cache(hub: HubServer, client: Client) -> None:
    offline = {"HF_HUB_OFFLINE": "1"}
    error = client.open(environment=offline)["error"]
    assert error.startswith(f"org/tiny is not completely in the cache {client.home}/hub and HF_HUB_OFFLINE forbids")
    assert hub.seen == []
    online = client.open()
    hub.seen.clear()
    again = client.open(environment=offline)
    assert {key: again[key] for key in ("revision", "weights", "files")} == {
        key: online[key] for key in ("revision", "weights", "files")
    }
    assert hub.seen == []


def test_offline_with_half_of_the_files(hub: HubServer, client: Client) -> None:
    client.open()
    for link in client.home.rglob(SHARDS[0]):
        link.unlink()
    error = client.open(environment={"HF_HUB_OFFLINE": "1"})["error"]
    assert error.startswith("org/tiny is not completely in the cache")


def test_no_network(tmp_path: Path) -> None:
    error = Client(tmp_path, "http://127.0.0.1:9").open()["error"]
    assert error.startswith("http://127.0.0.1:9 cannot be reached (")
    assert "check the network, HF_ENDPOINT" in error


def test_without_network_the_cache_serves(hub: HubServer, client: Client) -> None:
    online = client.open()
    offline = Client(client.home, "http://127.0.0.1:9").open()
    assert offline["revision"] == online["revision"]


def test_a_cache_that_cannot_be_written(client: Client, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    error = client.open(cache_dir=str(tmp_path / "file"))["error"]
    assert error.startswith(f"org/tiny cannot be stored in {tmp_path}/file (")


def test_a_full_disk() -> None:
    error = OSError(28, "No space left on device")
    names = {"repo": "org/tiny", "revision": None, "endpoint": "http://hub", "cache": "/cache"}
    sentence = "The disk is full while org/tiny is downloaded to /cache; free space or name another --cache-dir."
    assert explain(error, **names) == sentence
    assert explain(ZeroDivisionError(), **names) is None


@pytest.mark.parametrize("name", ["org/na me", "-x", "a--b"])
def test_a_name_that_cannot_be_an_id(client: Client, name: str) -> None:
    result = client.open(name)
    assert "nor an id on the hub, which looks like organisation/name" in result["error"]
    assert result["exit_code"] == UsageError.exit_code != LlamaExportError.exit_code


def test_a_repository_of_gguf_files(hub: HubServer, client: Client) -> None:
    hub.repos["org/gguf"] = Repo({"tiny-Q4_0.gguf": b"GGUF", "README.md": b""})
    assert client.open("org/gguf")["error"] == (
        "The repository org/gguf holds GGUF files and no safetensors; "
        "name one of them, such as org/gguf:tiny-Q4_0.gguf."
    )


def test_a_repository_of_pickles(hub: HubServer, client: Client, checkpoint: dict[str, bytes]) -> None:
    files = {name: data for name, data in checkpoint.items() if "safetensors" not in name}
    hub.repos["org/old"] = Repo(files)
    assert "holds its weights as pickle (pytorch_model.bin), which can run code" in client.open("org/old")["error"]


def test_a_gguf_file_of_a_repository_that_is_not_there(hub: HubServer, client: Client) -> None:
    hub.repos["org/gguf"] = Repo({"tiny-Q4_0.gguf": b"GGUF"})
    error = client.open("org/gguf:tiny-Q4_1.gguf")["error"]
    assert error.startswith("The repository org/gguf has no file 'tiny-Q4_1.gguf'; its GGUF files are tiny-Q4_0.gguf.")
    assert error.endswith("Did you mean 'tiny-Q4_0.gguf'?")


def test_a_gguf_file_of_a_repository_is_opened(hub: HubServer, client: Client, tmp_path: Path) -> None:
    file = write_llama_gguf(tmp_path / "tiny.gguf", types="Q4_0")
    hub.repos["org/gguf"] = Repo({"in/tiny-Q4_0.gguf": file.read_bytes()})
    result = client.open("org/gguf:in/tiny-Q4_0.gguf")
    assert (result["model_id"], result["kind"]) == ("org/gguf:in/tiny-Q4_0.gguf", "gguf")
    assert result["revision"] == COMMIT
    assert result["weights"] == client.open(str(file))["weights"]


@pytest.mark.parametrize("name", ["org/gguf:../secret.gguf", "org/gguf:/secret.gguf"])
def test_a_gguf_file_outside_of_the_repository_is_refused(client: Client, name: str) -> None:
    result = client.open(name)
    assert result["exit_code"] == 2
    assert "name a folder, a GGUF file or a hub id" in result["error"]


def test_a_misspelt_folder_is_told_where_nothing_was_found(client: Client) -> None:
    (client.home / "org" / "stories").mkdir(parents=True)
    error = client.open("org/storys")["error"]
    assert error.endswith("Nor is there a folder org/storys here. Did you mean 'stories'?")


def test_a_model_that_was_found_and_refused_is_not_called_missing(hub: HubServer, client: Client) -> None:
    (client.home / "org").mkdir()
    hub.repos["org/vision"] = Repo({"config.json": json.dumps({"model_type": "mllama"}).encode()})
    error = client.open("org/vision")["error"]
    assert "Llama 3.2 Vision" in error
    assert "Nor is there a folder" not in error
