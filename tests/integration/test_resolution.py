"""Names in the params of a job, looked up in a real projection: what its owner may use is found,
and nobody reaches or hears of anything else."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import msgspec
import pytest

from deploy.local.installation import REPOSITORY
from deploy.local.stack import Stack
from services.gateway.auth import Person
from services.gateway.errors import ApiError
from services.gateway.resolution import FoundFile, NamedByParams, find_file, resolve
from services.gateway.views import Views
from shared.contracts.models import Checkpoint, CheckpointFile
from shared.objects import StoredParams
from shared.webui.settings import WebuiSettings
from shared.webui.titles import SUFFIXES
from shared.weights.kinds import Kind

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
MIGRATIONS = REPOSITORY / "services" / "gateway" / "migrations"
ALICE = Person(username="alice", roles=["Designer"], permissions=frozenset())
ADMIN = Person(username="admin", roles=[], permissions=frozenset({"user:all"}))
SD1 = Kind("Stable-diffusion", "a SD 1.x checkpoint", "SD 1.x")
SDXL = Kind("Stable-diffusion", "a SDXL checkpoint", "SDXL")


CHOSEN = Checkpoint(
    version=1,
    checkpoint_id="chosen",
    type="Stable-diffusion",
    names=["chosen"],
    status="Active",
    s3_location="",
    bucket="models",
    files=[CheckpointFile(filename="chosen", key="k")],
    multipart_upload={},
    creator="alice",
    message="",
    params={},
    allowed_roles_or_users=[],
    created_at=NOW,
)
"""What a job of these tests lists where it is not said otherwise."""


@pytest.fixture(scope="module")
async def pool(servers: Stack) -> AsyncIterator[asyncpg.Pool[Any]]:
    name = f"trial_{uuid4().hex[:8]}"
    admin = await asyncpg.connect(servers.installation.postgres_url("postgres", "postgres"))
    await admin.execute(f"CREATE DATABASE {name}")
    try:
        async with asyncpg.create_pool(
            servers.installation.postgres_url("postgres", name), min_size=1, max_size=2
        ) as pool:
            for file in sorted(Path(MIGRATIONS).glob("*.sql")):
                await pool.execute(file.read_text())
            yield pool
    finally:
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await admin.close()


@pytest.fixture
async def registry(pool: asyncpg.Pool[Any]) -> Registry:
    await pool.execute("TRUNCATE aggregates")
    return Registry(pool)


class Registry:
    """Checkpoints as the projection has them, and a job's params looked up among them."""

    def __init__(self, pool: asyncpg.Pool[Any]) -> None:
        self.pool = pool

    async def add(
        self,
        type_: str,
        *names: str,
        creator: str = "bob",
        allowed: tuple[str, ...] = ("*",),
        status: str = "Active",
        deleted: bool = False,
        sha256: str = "",
        kind: Kind | None = None,
    ) -> Checkpoint:
        checkpoint = msgspec.structs.replace(
            CHOSEN,
            checkpoint_id=uuid4().hex,
            type=type_,
            names=list(names),
            status=status,
            files=[
                CheckpointFile(filename=name, key=f"k/{name}", size=7, sha256=sha256, kind=kind)
                for name in names
            ],
            creator=creator,
            allowed_roles_or_users=list(allowed),
            deleted=deleted,
        )
        await self.pool.execute(
            "INSERT INTO aggregates VALUES ('checkpoint', $1, 1, $2, $3)",
            checkpoint.checkpoint_id,
            deleted,
            msgspec.json.encode(checkpoint).decode(),
        )
        return checkpoint

    async def resolve(
        self,
        body: dict[str, Any] | bytes,
        *listed: Checkpoint,
        task_type: str = "txt2img",
        owner: Person = ALICE,
    ) -> NamedByParams:
        files = [file for one in listed if (file := find_file(one, one.names[0]))]
        if task_type == "txt2img" and not listed:
            files = [FoundFile(CHOSEN, CHOSEN.files[0], "chosen")]
        params = StoredParams(body if isinstance(body, bytes) else json.dumps(body).encode(), NOW)
        return await resolve(task_type, params, files, owner, Views(self.pool), WebuiSettings())

    async def find(self, body: dict[str, Any], *listed: Checkpoint, **more: Any) -> list[str]:
        return [model.name for model in (await self.resolve(body, *listed, **more)).models]


def settings(**fields: str) -> dict[str, Any]:
    return {"override_settings": fields}


def plot(number: int, *values: str) -> dict[str, Any]:
    return {"script_name": "x/y/z plot", "script_args": [number, "", [*values], *[0, "", []] * 2]}


DIGEST = "0123456789abcdef" * 4
WAYS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "checkpoint": ("txt2img", "Stable-diffusion", "x", settings(sd_model_checkpoint="x")),
    "checkpoint by its hash": (
        *("txt2img", "Stable-diffusion", "y"),
        settings(sd_model_checkpoint=DIGEST[:10]),
    ),
    "checkpoint with its hash": (
        *("txt2img", "Stable-diffusion", "x"),
        settings(sd_model_checkpoint=f"x.ckpt [{DIGEST[:10]}]"),
    ),
    "refiner": ("txt2img", "Stable-diffusion", "x", {"refiner_checkpoint": "x"}),
    "refiner as a script": (
        *("img2img", "Stable-diffusion", "x"),
        {**settings(sd_model_checkpoint="x")}
        | {"alwayson_scripts": {"refiner": {"args": [True, "x", 0.5]}}},
    ),
    "hires checkpoint": (
        *("txt2img", "Stable-diffusion", "x"),
        {"enable_hr": True, "hr_checkpoint_name": "x"},
    ),
    "VAE": ("txt2img", "VAE", "x", settings(sd_vae="x")),
    "LoRA": ("txt2img", "Lora", "x", {"prompt": "<lora:x:1>"}),
    "LoRA by its alias": ("txt2img", "Lora", "y", {"prompt": "<lora:Its Alias:1>"}),
    "LoRA of hires": ("txt2img", "Lora", "x", {"enable_hr": True, "hr_prompt": "<lyco:x:1>"}),
    "embedding": ("txt2img", "embeddings", "x", {"negative_prompt": "an x"}),
    "ControlNet": (
        *("txt2img", "ControlNet", "x"),
        {"alwayson_scripts": {"controlnet": {"args": [{"model": "x [d14c016b]"}]}}},
    ),
    "hires upscaler": ("txt2img", "Upscaler", "x", {"enable_hr": True, "hr_upscaler": "x"}),
    "upscaler of SD upscale": (
        *("img2img", "Upscaler", "x"),
        {"script_name": "SD upscale", "script_args": ["", 64, "x", 2]},
    ),
    "upscaler": ("extra-single-image", "Upscaler", "x", {"upscaler_1": "x"}),
    "upscaler by the webui's name": (
        *("extra-single-image", "Upscaler", "RealESRGAN_x4plus"),
        {"upscaler_1": "R-ESRGAN 4x+"},
    ),
    "second upscaler": (
        *("extra-single-image", "Upscaler", "x"),
        {"upscaler_2": "x", "extras_upscaler_2_visibility": 1},
    ),
    "checkpoint of a plot": ("txt2img", "Stable-diffusion", "x", plot(11, "x")),
    "VAE of a plot": ("txt2img", "VAE", "x", plot(27, "x")),
    "refiner of a plot": ("txt2img", "Stable-diffusion", "x", plot(35, "x")),
    "LoRA of a plot": (
        *("txt2img", "Lora", "x"),
        {"prompt": "a cat", **plot(7)} | {"script_args": [7, "cat, <lora:x:1>", [], 0, "", []]},
    ),
    "face restoration": (
        *("img2img", "FaceRestoration", "x"),
        {"restore_faces": True, **settings(face_restoration_model="x")},
    ),
    "face restoration by its kind": (
        *("extra-single-image", "FaceRestoration", "y"),
        {"gfpgan_visibility": 0.5},
    ),
    "face restoration of a plot": (
        *("txt2img", "FaceRestoration", "y"),
        {**plot(30), "script_args": [30, "False, GFPGAN", [], *[0, "", []] * 2]},
    ),
    "rembg": ("rembg", "rembg", "x", {"model": "x"}),
    "vitmatte": ("rembg", "rembg", "vitmatte-x", {"vitmatte": True, "vitmatte_model": "x"}),
}
"""Every way to name a model: task, type, the file's name without its suffix, and the body."""


@pytest.mark.parametrize("way", WAYS)
async def test_nobody_reaches_by_any_way_what_they_may_not_use(
    registry: Registry, way: str
) -> None:
    """And no message tells them that it is there."""
    task_type, type_, stem, body = WAYS[way]
    alias = "Its Alias" if type_ == "Lora" else ""
    family = "GFPGAN" if type_ == "FaceRestoration" else ""
    kind = Kind(type_, "a file", family, alias=alias)
    usual = await registry.add("Stable-diffusion", "usual.ckpt", creator="alice")
    theirs = await registry.add(
        type_, f"{stem}.pt", allowed=("carol", "IT Operator"), sha256=DIGEST, kind=kind
    )
    if type_ == "embeddings":  # a word is a word where it names nothing
        assert await registry.find(body, usual, task_type=task_type) == []
    else:
        with pytest.raises(ApiError) as refused:
            await registry.resolve(body, usual, task_type=task_type)
        assert refused.value.status == 404
        assert refused.value.message.endswith(f"type {type_} is not found")
        assert f"{stem}.pt" not in refused.value.message
    seen = await registry.resolve(body, usual, task_type=task_type, owner=ADMIN)
    assert [model.checkpoint_id for model in seen.models] == [theirs.checkpoint_id]
    await registry.pool.execute(
        """
        UPDATE aggregates SET state = jsonb_set(state, '{allowed_roles_or_users}', '["Designer"]')
        """
    )
    now = await registry.resolve(body, usual, task_type=task_type)
    (model,) = now.models
    assert (model.type, model.name, model.key) == (type_, f"{stem}.pt", f"k/{stem}.pt")
    assert model.from_params
    assert now.params_at == NOW
    assert [one.checkpoint_id for one in now.checkpoints] == [theirs.checkpoint_id]


@pytest.mark.parametrize(
    "more", [{"status": "Disabled"}, {"status": "Creating"}, {"deleted": True}]
)
async def test_what_is_not_active_is_not_found(registry: Registry, more: dict[str, Any]) -> None:
    await registry.add("Lora", "one.safetensors", **more)
    with pytest.raises(ApiError, match=r"name one, type Lora is not found$"):
        await registry.resolve({"prompt": "<lora:one:1>"})


async def test_who_may_use_it_finds_it(registry: Registry) -> None:
    body = {"prompt": "<lora:one:1>"}
    for name, given in {
        "everybody": {"allowed": ("*",)},
        "by name": {"allowed": ("alice",)},
        "by role": {"allowed": ("Designer",)},
        "own": {"allowed": ("nobody",), "creator": "alice"},
    }.items():
        await registry.pool.execute("TRUNCATE aggregates")
        await registry.add("Lora", "one.safetensors", **given)  # type: ignore[arg-type]
        assert await registry.find(body) == ["one.safetensors"], name


async def test_a_name_means_what_the_job_lists_before_anything_else(registry: Registry) -> None:
    mine = await registry.add("Lora", "style.pt", creator="alice", kind=Kind("Lora", "", alias="s"))
    await registry.add("Lora", "style.safetensors", creator="alice")
    checkpoint = await registry.add("Stable-diffusion", "a.ckpt")
    assert await registry.find({"prompt": "<lora:STYLE:1>"}, checkpoint, mine) == []
    assert await registry.find({"prompt": "<lora:s:1>"}, checkpoint, mine) == []
    assert await registry.find(settings(sd_model_checkpoint="a"), checkpoint) == []
    word = await registry.add("embeddings", "cat.pt")
    assert await registry.find({"prompt": "a cat"}, checkpoint) == ["cat.pt"]
    assert await registry.find({"prompt": "a cat"}, checkpoint, word) == []


async def test_ones_own_goes_before_what_others_let_everybody_use(registry: Registry) -> None:
    await registry.add("Lora", "style.pt", creator="alice")
    await registry.add("Lora", "style.safetensors", creator="mallory")
    await registry.add("embeddings", "cat.safetensors", creator="mallory")
    await registry.add("embeddings", "cat.pt", creator="alice")
    body = {"prompt": "a cat <lora:style:1>"}
    assert await registry.find(body) == ["style.pt", "cat.pt"]


async def test_one_file_of_several_is_found_and_named_once(registry: Registry) -> None:
    pack = await registry.add("Lora", "one.pt", "two.pt", "three.pt")
    found = await registry.resolve({"prompt": "<lora:two:1> <lora:two.pt:1> <lora:Three:1>"})
    assert [model.name for model in found.models] == ["two.pt", "three.pt"]
    assert [one.checkpoint_id for one in found.checkpoints] == [pack.checkpoint_id]


async def test_what_is_not_found_is_told_with_what_is_close(registry: Registry) -> None:
    for name in ("watercolour_v2.safetensors", "Watercolor.pt", "oil.pt"):
        await registry.add("Lora", name)
    await registry.add("Lora", "watercolor_v3.safetensors", allowed=("carol",))
    await registry.add("VAE", "watercolors.pt")
    body = {"prompt": "<lora:watercolors:1>", **settings(sd_vae="nothing like it")}
    with pytest.raises(ApiError) as refused:
        await registry.resolve(body)
    assert refused.value.status == 404
    vae, lora = refused.value.message.split("; prompt: ")
    assert vae == (
        "override_settings.sd_vae: checkpoint with name nothing like it, type VAE is not found"
    )
    assert lora == (
        "<lora:…>: checkpoint with name watercolors, type Lora is not found; close to it:"
        " Watercolor.pt, watercolour_v2.safetensors"
    )


async def test_a_long_name_and_many_names_are_refused_in_few_words(registry: Registry) -> None:
    with pytest.raises(ApiError) as refused:
        await registry.resolve(settings(sd_vae="x" * 50_000))
    assert len(refused.value.message) < 300
    prompt = " ".join(f"<lora:l{number}:1>" for number in range(201))
    with pytest.raises(ApiError, match="they name 201 models, allowed are 200") as refused:
        await registry.resolve({"prompt": prompt})
    assert refused.value.status == 400
    prompt = " ".join(f"<lora:l{number}:1>" for number in range(5000))
    with pytest.raises(ApiError, match="they name 2000 models or more, allowed are 200"):
        await registry.resolve({"prompt": prompt})
    with pytest.raises(ApiError, match="they have more than 500000 values"):
        await registry.resolve({"alwayson_scripts": [[]] * 600_000})


@pytest.mark.parametrize("task_type", ["txt2img", "img2img"])
async def test_pictures_need_a_checkpoint_from_the_job_or_its_body(
    registry: Registry, task_type: str
) -> None:
    lora = await registry.add("Lora", "one.pt")
    await registry.add("Stable-diffusion", "a.ckpt")
    with pytest.raises(ApiError, match=r"override_settings\.sd_model_checkpoint") as refused:
        await registry.resolve({"refiner_checkpoint": "a"}, lora, task_type=task_type)
    assert refused.value.status == 400
    body = settings(sd_model_checkpoint="a")
    assert await registry.find(body, lora, task_type=task_type) == ["a.ckpt"]


@pytest.mark.parametrize("params", [b"", b"no JSON", b"[]"])
async def test_params_that_are_no_body_are_left_to_the_worker(
    registry: Registry, params: bytes
) -> None:
    lora = await registry.add("Lora", "one.pt")
    assert await registry.resolve(params, lora) == NamedByParams(NOW)


@pytest.mark.parametrize("suffix", SUFFIXES)
async def test_a_file_is_found_without_its_suffix(registry: Registry, suffix: str) -> None:
    await registry.add("VAE", f"Une Été [v2]{suffix.upper()}")
    (name,) = await registry.find(settings(sd_vae="une été [v2]"))
    assert name == f"Une Été [v2]{suffix.upper()}"


async def test_any_model_that_restores_faces_does_where_nothing_names_one(
    registry: Registry,
) -> None:
    checkpoint = await registry.add("Stable-diffusion", "a.ckpt")
    files = {}
    for name in ("CodeFormer", "GFPGAN", "RestoreFormer"):
        kind = Kind("FaceRestoration", "", name)
        files[name] = await registry.add("FaceRestoration", f"{name.lower()}-1.pth", kind=kind)
    assert await registry.find({"restore_faces": True}, checkpoint) == ["gfpgan-1.pth"]
    listed = (checkpoint, files["RestoreFormer"])
    assert await registry.find({"restore_faces": True}, *listed) == []
    named = {"restore_faces": True, **settings(face_restoration_model="codeformer")}
    assert await registry.find(named, *listed) == ["codeformer-1.pth"]
    assert await registry.find(named, checkpoint, files["CodeFormer"]) == []


async def test_an_embedding_of_another_family_is_just_a_word(registry: Registry) -> None:
    def embedding(*widths: int) -> Kind:
        return Kind("embeddings", "an embedding", widths=[*widths])

    await registry.add("embeddings", "cat.pt", kind=embedding(768))
    await registry.add("embeddings", "cat.safetensors", kind=embedding(1280, 768))
    await registry.add("embeddings", "dog.pt", kind=embedding(1024))
    await registry.add("embeddings", "cow.pt", kind=embedding(24))
    small = await registry.add("Stable-diffusion", "a.ckpt", kind=SD1)
    large = await registry.add("Stable-diffusion", "b.ckpt", kind=SDXL)
    body = {"prompt": "a cat, a dog, a cow"}
    assert sorted(await registry.find(body, small)) == ["cat.pt", "cow.pt"]
    assert sorted(await registry.find(body, large)) == ["cat.safetensors", "cow.pt"]
    found = await registry.find(body | settings(sd_model_checkpoint="b"), small)
    assert found[0] == "b.ckpt"


async def test_only_words_that_stand_in_a_prompt_are_embeddings(registry: Registry) -> None:
    for name in ("cat.pt", "style (v1).pt", "bad-hands-5.pt", "hr.pt"):
        await registry.add("embeddings", name)
    assert await registry.find({"prompt": "concatenate <lora:cat:1>"} | NO_NETWORKS) == []
    assert await registry.find({"prompt": "(CAT:1.2)"}) == ["cat.pt"]
    assert await registry.find(
        {"negative_prompt": "bad-hands-5, style \\(v1\\)"} | NO_NETWORKS
    ) in (
        ["style (v1).pt", "bad-hands-5.pt"],
        ["bad-hands-5.pt", "style (v1).pt"],
    )
    await registry.add("embeddings", "dog.pt", *[f"word{number}.pt" for number in range(20)])
    assert await registry.find({"prompt": "a dog"}) == [], "a checkpoint of many files is listed"
    assert await registry.find({"hr_prompt": "hr"}) == []
    assert await registry.find({"hr_negative_prompt": "hr", "enable_hr": True}) == ["hr.pt"]


NO_NETWORKS = {"disable_extra_networks": True}


async def test_signs_that_no_name_has_are_in_nobodys_way(registry: Registry) -> None:
    await registry.add("embeddings", "zorb.pt")
    for sign in ("\0", "\ud800"):
        assert await registry.find({"prompt": f"a {sign}zorb {sign}"}) == ["zorb.pt"]
        with pytest.raises(ApiError, match="sd_vae: checkpoint with name") as error:
            await registry.find(settings(sd_vae=f"a{sign}b"))
        assert error.value.message.encode()


async def test_looking_a_name_up_reads_no_more_than_the_index(registry: Registry) -> None:
    await registry.pool.execute(
        """
        INSERT INTO aggregates
        SELECT 'checkpoint', 'c' || n, 1, false, jsonb_build_object(
            'type', 'Lora', 'status', 'Active', 'creator', 'bob',
            'names', jsonb_build_array('lora-' || n || '.safetensors'), 'files', '[]'::jsonb)
        FROM generate_series(1, 3000) AS n
        """
    )
    await registry.pool.execute("ANALYZE aggregates")
    plan = await registry.pool.fetch(
        """
        EXPLAIN SELECT state FROM aggregates
        WHERE kind = 'checkpoint' AND NOT deleted AND checkpoint_keys(state) && ARRAY['lora-7']
        """
    )
    assert "checkpoints_by_key" in "\n".join(row[0] for row in plan)
