"""What a user would see go wrong: two workers on one GPU, a type that means something else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.endpoints.app import choose_launcher
from services.endpoints.domain import InstanceType
from services.endpoints.launchers import LaunchFailed, NoRoomYet, describe_end
from services.endpoints.launchers.docker import DockerLauncher
from services.endpoints.launchers.gpus import Held, pick_gpus, visible_gpus
from services.endpoints.launchers.nomad import NomadLauncher
from services.endpoints.launchers.process import ProcessLauncher
from services.endpoints.settings import Settings
from shared.errors import Rejected
from shared.settings import load
from shared.webui.settings import WebuiSettings

GPU = InstanceType(device="cuda", max=9)
PAIR = InstanceType(device="cuda", max=9, gpus=2)
SHARING = InstanceType(device="cuda", max=9, share_gpus=True)


def settings(**more: str) -> Settings:
    names = (
        "nats_url",
        "nats_user",
        "nats_password",
        "postgres_url",
        "s3_url",
        "worker_nats_password",
        "worker_s3_access_key",
        "worker_s3_secret_key",
        "worker_cache",
    )
    values = {**dict.fromkeys(names, "x"), **more}
    return load(Settings, {f"DARKROOM_{name.upper()}": value for name, value in values.items()})


def types(**named: object) -> dict[str, str]:
    return {"instance_types": json.dumps(named), "default_instance_type": ""}


def test_a_gpu_is_one_workers_own() -> None:
    assert pick_gpus(InstanceType(device="cpu", max=1), ["0"], []) == []
    assert pick_gpus(GPU, ["0", "1"], []) == ["0"]
    assert pick_gpus(GPU, ["0", "1"], [Held(gpus=["0"])]) == ["1"]
    assert pick_gpus(PAIR, ["0", "1", "2"], [Held(gpus=["1"])]) == ["0", "2"]
    with pytest.raises(LaunchFailed, match="out of GPUs: 2 wanted, 1 of 2 free"):
        pick_gpus(PAIR, ["0", "1"], [Held(gpus=["0"])])
    with pytest.raises(LaunchFailed, match="out of GPUs: 1 wanted, 0 of 0 free"):
        pick_gpus(GPU, [], [])


def test_gpus_are_shared_only_among_those_who_share() -> None:
    shared = [Held(gpus=["0"], shared=True)]
    assert pick_gpus(SHARING, ["0", "1"], shared) == ["1"], "the least used"
    assert pick_gpus(SHARING, ["0", "1"], [*shared, Held(gpus=["1"])]) == ["0"]
    assert pick_gpus(GPU, ["0", "1"], shared) == ["1"]
    with pytest.raises(LaunchFailed):
        pick_gpus(GPU, ["0"], shared)
    with pytest.raises(LaunchFailed):
        pick_gpus(SHARING, ["0"], [Held(gpus=["0"])])


def test_a_gpu_that_is_being_given_back_is_worth_waiting_for() -> None:
    with pytest.raises(NoRoomYet):
        pick_gpus(GPU, ["0"], [Held(gpus=["0"], leaving=True)])
    with pytest.raises(LaunchFailed):
        pick_gpus(PAIR, ["0"], [Held(gpus=["0"], leaving=True)])


def test_the_gpus_of_this_machine_are_those_that_we_may_see(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-5b1e")
    assert visible_gpus() == ["2", "GPU-5b1e"]
    assert settings().known_gpus() == ["2", "GPU-5b1e"]
    assert settings(gpus="7,").known_gpus() == ["7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []


def test_an_end_says_signal_memory_and_last_words() -> None:
    assert describe_end(0, "") == "the worker exited with code 0"
    assert describe_end(137, "\n") == "the worker was killed by SIGKILL"
    assert describe_end(255, "") == "the worker exited with code 255"
    log = "\n".join(f"line {n}" for n in range(9)) + "\n\n"
    assert describe_end(1, log).splitlines()[0] == "the worker exited with code 1: line 3"
    assert describe_end(1, log).endswith("line 8")
    assert describe_end(137, "", out_of_memory=1024**3) == (
        "the worker ran out of memory: 1024 MiB allowed"
    )


def test_types_say_what_they_need_and_have_other_names() -> None:
    known = settings(
        **types(
            a100={"device": "cuda", "gpus": 2, "memory": "1.5 GiB", "max": 3, "image": "w:1"},
            cpu={"device": "cpu", "max": 1},
            **{"ml.g5.2xlarge": "a100"},
        )
    ).known_types()
    type = known.get("ml.g5.2xlarge")
    assert type is known.get("a100")
    assert (type.gpu_count, type.memory_bytes, type.image) == (2, 3 * 512 * 1024**2, "w:1")
    assert (known.get("cpu").gpu_count, known.get("cpu").memory_bytes) == (0, 0)
    assert InstanceType(device="cuda:1", max=1).gpu_count == 1
    with pytest.raises(Rejected) as unknown:
        known.get("ml.p4d.24xlarge")
    assert unknown.value.message.startswith("ResourceLimitExceeded: instance type ml.p4d.24xlarge")
    assert unknown.value.message.endswith("known: a100, cpu, ml.g5.2xlarge")


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"device": "cpu", "max": 1, "gpus": 1}, "a device cpu has no gpus"),
        ({"device": "cuda", "max": 1, "memory": "16 gigs"}, '"16 GiB", not "16 gigs"'),
        ({"device": "cuda", "max": -1}, "negative"),
        ({"device": "cuda", "max": 1, "nomad": {"cpus": 4}}, "cpus"),
        ("nobody", "has no nobody"),
    ],
)
def test_a_type_that_makes_no_sense_stops_the_service_at_start(
    wrong: object, complaint: str
) -> None:
    with pytest.raises(SystemExit, match="DARKROOM_INSTANCE_TYPES") as stopped:
        settings(**types(wrong=wrong)).known_types()
    assert complaint in str(stopped.value)


def test_the_launcher_is_a_setting(tmp_path: Path) -> None:
    gpu = {"device": "cuda", "max": 1, "image": "w:1", "memory": "8 GiB"}
    more = types(gpu=gpu)
    assert isinstance(choose_launcher(settings(run=str(tmp_path))), ProcessLauncher)
    docker = choose_launcher(settings(launcher="docker", installation="here", **more))
    assert isinstance(docker, DockerLauncher)
    assert docker.workers_outlive_service
    nomad = choose_launcher(
        settings(launcher="nomad", installation="here", keep_workers="false", **more)
    )
    assert isinstance(nomad, NomadLauncher)
    assert not nomad.workers_outlive_service


@pytest.mark.parametrize(
    ("missing", "complaint"),
    [
        ({}, "set DARKROOM_RUN"),
        ({"launcher": "docker"}, "set DARKROOM_INSTALLATION"),
        ({"launcher": "docker", "installation": "Here!"}, "set DARKROOM_INSTALLATION"),
        (
            {"launcher": "docker", "installation": "i", **types(t={"device": "cpu", "max": 1})},
            "t needs an image",
        ),
        ({"launcher": "nomad", "installation": "i"}, "cpu needs a memory"),
        ({"launcher": "swarm"}, "bad setting"),
    ],
)
def test_what_a_launcher_lacks_stops_the_service_at_start(
    missing: dict[str, str], complaint: str
) -> None:
    with pytest.raises(SystemExit, match=complaint):
        choose_launcher(settings(**missing))


def test_workers_are_told_what_is_set_for_bodies() -> None:
    assert not any("MAX" in name for name in settings().program().environment)
    told = settings(max_steps="200", max_eta="2.5", webui_version="1.10").program().environment
    assert told["DARKROOM_MAX_STEPS"] == "200"
    of_workers = load(WebuiSettings, told)
    assert of_workers == WebuiSettings(max_steps=200, max_eta=2.5, webui_version="1.10")
    with pytest.raises(SystemExit, match="max_steps"):
        settings(max_steps="2000")


def test_workers_are_told_the_styles_wherever_they_run(tmp_path: Path) -> None:
    file = tmp_path / "styles.csv"
    file.write_text("name,prompt,negative_prompt\nsharp,sharp,soft\n")
    for launcher in ("process", "docker"):
        environment = settings(styles=str(file), launcher=launcher).program().environment
        told = json.loads(environment["DARKROOM_STYLES"])
        assert told == {"sharp": {"prompt": "sharp", "negative_prompt": "soft"}}
    file.write_text("name,prompt\n" + "".join(f"{n},{'x' * 90}\n" for n in range(1000)))
    large = str(tmp_path / "large.csv")
    file.rename(large)
    environment = settings(styles=large).program().environment
    assert environment["DARKROOM_STYLES"] == large
    with pytest.raises(SystemExit, match="DARKROOM_STYLES: its styles have 1"):
        settings(styles=large, launcher="docker").program()
    with pytest.raises(SystemExit, match=r"DARKROOM_STYLES: .*nowhere"):
        settings(styles="/nowhere.csv").program()


def test_secrets_are_no_part_of_what_launchers_show() -> None:
    program = settings(worker_nats_password="hush").program()
    assert program.secrets["DARKROOM_NATS_PASSWORD"] == "hush"
    assert "hush" not in program.environment.values()
    assert program.environment["DARKROOM_NATS_URL"] == "x"
    elsewhere = settings(launcher="docker", worker_nats_url="nats://nats:4222").program()
    assert elsewhere.environment["DARKROOM_NATS_URL"] == "nats://nats:4222"
    assert elsewhere.command[0] == "python"
