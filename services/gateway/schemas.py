"""Bodies of requests and answers, with ESD's own field names."""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, TypeVar

from msgspec import UNSET, Meta, Struct, UnsetType

T = TypeVar("T")

Name = Annotated[
    str, Meta(min_length=1, max_length=128, pattern=r"^(?! )[^\x00-\x1f\x7f]+(?<! )\Z")
]
"""No control characters, no space at either end."""
Id = Annotated[str, Meta(min_length=1, max_length=128)]
FileName = Annotated[
    str, Meta(min_length=1, max_length=255, pattern=r"^(?![. ])[^/\\\x00-\x1f\x7f]+(?<! )\Z")
]
Permission = Annotated[
    str,
    Meta(
        pattern=r"^(train|checkpoint|inference|sagemaker_endpoint|user|role):(all|create|list)\Z",
    ),
]
Password = Annotated[str, Meta(min_length=1, max_length=1024)]
Count = Annotated[str, Meta(pattern=r"^[0-9]{1,4}\Z")] | Annotated[int, Meta(ge=0, le=9999)]
"""ESD clients send counts as strings or integers."""

CheckpointType = Literal[
    "Stable-diffusion",
    "Lora",
    "VAE",
    "embeddings",
    "ControlNet",
    "hypernetworks",
    "Upscaler",
    "FaceRestoration",
    "rembg",
]
InferenceType = Literal["Async", "Real-time"]
TaskType = Literal["txt2img", "img2img", "rembg", "extra-single-image", "extra-batch-images"]
"""`extra-single-image` enlarges a picture, by an `Upscaler` or without any model;
`extra-batch-images` several."""
NOT_APPLICABLE = "not_applicable"


class Empty(Struct, frozen=True):
    """`{}`"""


class Message(Struct, frozen=True):
    """An answer that is only a message."""

    statusCode: int
    message: str


class Answer(Struct, Generic[T], frozen=True):
    """An answer with data."""

    statusCode: int
    data: T
    message: str = "OK"


# Roles and users


class CreateRoleBody(Struct, frozen=True, kw_only=True):
    """`creator` is ignored: the creator is who asks."""

    role_name: Name
    permissions: Annotated[list[Permission], Meta(max_length=100)]
    creator: str = ""


class DeleteRolesBody(Struct, frozen=True, kw_only=True):
    role_name_list: Annotated[list[Name], Meta(min_length=1, max_length=100)]


class RoleView(Struct, frozen=True, kw_only=True):
    role_name: str
    creator: str
    permissions: list[str]


class Roles(Struct, frozen=True, kw_only=True):
    """Without `per_page` all of them are one page."""

    roles: list[RoleView]
    page: int
    per_page: int
    pages: int
    total: int
    previous_evaluated_key: str = NOT_APPLICABLE
    last_evaluated_key: str = NOT_APPLICABLE


class CreateUserBody(Struct, frozen=True, kw_only=True):
    """`permissions` are the user's own, beside those of the roles. `password` has at least 8
    characters, in the ESD profile 1. `initial`: ESD profile only."""

    username: Name
    password: Password
    roles: Annotated[list[Name], Meta(max_length=100)] = []
    creator: str = ""
    permissions: Annotated[list[Permission], Meta(max_length=100)] = []
    initial: bool = False


class ChangeUserBody(Struct, frozen=True, kw_only=True):
    """What is left out stays as it is. A new password, of at least 8 characters, ends the user's
    access tokens."""

    roles: Annotated[list[Name], Meta(max_length=100)] | None = None
    permissions: Annotated[list[Permission], Meta(max_length=100)] | None = None
    password: Password | None = None


class DeleteUsersBody(Struct, frozen=True, kw_only=True):
    user_name_list: Annotated[list[Name], Meta(min_length=1, max_length=100)]


class UserView(Struct, frozen=True, kw_only=True):
    """`password`: never the password, which is stored as a hash."""

    username: str
    roles: list[str]
    creator: str
    permissions: list[str]
    password: str = "********"


class Users(Struct, frozen=True, kw_only=True):
    users: list[UserView]
    previous_evaluated_key: str = NOT_APPLICABLE
    last_evaluated_key: str = NOT_APPLICABLE


# Tokens


class LogInBody(Struct, frozen=True, kw_only=True):
    username: Annotated[str, Meta(min_length=1, max_length=128)]
    password: Password


class AccessToken(Struct, frozen=True, kw_only=True):
    """`expires_in` in seconds."""

    access_token: str
    token_type: str
    expires_in: int
    statusCode: int = 200
    message: str = "OK"


class CreateTokenBody(Struct, frozen=True, kw_only=True):
    """`expires_in` in seconds; null means that the token lasts until it is revoked."""

    name: Name
    expires_in: Annotated[int, Meta(ge=60, le=10 * 365 * 86400)] | None = None


class TokenView(Struct, frozen=True, kw_only=True):
    id: str
    name: str
    created: str
    expires: str | None


class Tokens(Struct, frozen=True, kw_only=True):
    tokens: list[TokenView]


class NewToken(Struct, frozen=True, kw_only=True):
    """`access_token` is shown this once; only its hash is kept."""

    token: TokenView
    access_token: str


# Checkpoints


class UploadFileBody(Struct, frozen=True, kw_only=True):
    filename: FileName
    parts_number: Annotated[int, Meta(ge=1, le=10000)] = 1


class CreateCheckpointBody(Struct, frozen=True, kw_only=True):
    """Either `filenames` (you upload) or `urls` (Darkroom downloads).

    `allowed_roles_or_users` says who may see and use it; by default everyone (`*`)."""

    checkpoint_type: CheckpointType
    params: dict[str, Any] = {}
    filenames: Annotated[list[UploadFileBody], Meta(min_length=1, max_length=100)] = []
    urls: Annotated[
        list[Annotated[str, Meta(min_length=1, max_length=4096)]],
        Meta(min_length=1, max_length=100),
    ] = []
    allowed_roles_or_users: Annotated[list[Name], Meta(min_length=1, max_length=100)] = []


class PartTagBody(Struct, frozen=True, kw_only=True):
    """What S3 answered to the PUT of one part."""

    ETag: Annotated[str, Meta(min_length=1, max_length=256)]
    PartNumber: Annotated[int, Meta(ge=1, le=10000)]


class UpdateCheckpointBody(Struct, frozen=True, kw_only=True):
    """One of: `status: Active` with the ETags of the upload; a `status` alone to switch a complete
    checkpoint on or off; `status: Creating` to download a failed one again; a new `name`."""

    status: Literal["Active", "Disabled", "Creating"] | None = None
    multi_parts_tags: dict[str, list[PartTagBody]] | None = None
    name: FileName | None = None


class DeleteCheckpointsBody(Struct, frozen=True, kw_only=True):
    checkpoint_id_list: Annotated[list[Id], Meta(min_length=1, max_length=100)]


class UploadView(Struct, frozen=True, kw_only=True):
    upload_id: str
    bucket: str
    key: str


class CheckpointView(Struct, frozen=True, kw_only=True):
    """As POST and PUT show it. `params` holds message, creator, created, multipart_upload and
    whatever the client gave beside."""

    id: str
    type: str
    s3_location: str
    status: str
    params: dict[str, Any]


class NewCheckpoint(Struct, frozen=True, kw_only=True):
    """`s3PresignUrl`: filename -> the URLs to PUT the parts to, in order."""

    checkpoint: CheckpointView
    s3PresignUrl: dict[str, list[str]]


class OneCheckpoint(Struct, frozen=True, kw_only=True):
    checkpoint: CheckpointView


class UpdatedCheckpoint(Struct, frozen=True, kw_only=True):
    """Older clients read `checkpoint`, newer ones `data.checkpoint`."""

    statusCode: int
    headers: dict[str, str]
    checkpoint: CheckpointView
    data: OneCheckpoint
    message: str = "OK"


class CheckpointItem(Struct, frozen=True, kw_only=True):
    """As GET shows it. `created` in seconds since 1970. `params.files`: what was found out about
    each file, by its name: size, sha256, short_hash, format, type, title, family, precision,
    parameters, rank, alias, vectors, widths, as far as it has them. `error`: why it was refused or
    has failed."""

    id: str
    s3Location: str
    type: str
    status: str
    name: list[str]
    created: float
    allowed_roles_or_users: list[str]
    params: dict[str, Any]
    error: str | None


class Checkpoints(Struct, frozen=True, kw_only=True):
    page: int
    per_page: int
    pages: int
    total: int
    checkpoints: list[CheckpointItem]


class ListedCheckpoints(Struct, frozen=True, kw_only=True):
    """`checkpoints` beside `data`: ESD profile only, some old clients read it there."""

    statusCode: int
    data: Checkpoints
    message: str = "OK"
    checkpoints: list[CheckpointItem] | UnsetType = UNSET


# Endpoints


class CreateEndpointBody(Struct, frozen=True, kw_only=True):
    """`creator` is ignored: the creator is who asks. With `autoscaling_enabled` the number of
    instances follows the jobs that wait, between `min_instance_number` (by default 0 for Async, 1
    for Real-time) and `max_instance_number` (by default `initial_instance_count`). The last four
    are what ESD's clients send: what they ask for is refused."""

    endpoint_type: InferenceType
    instance_type: Annotated[str, Meta(min_length=1, max_length=64)]
    initial_instance_count: Count
    autoscaling_enabled: bool
    assign_to_roles: Annotated[list[Name], Meta(min_length=1, max_length=100)]
    endpoint_name: (
        Annotated[str, Meta(max_length=63, pattern=r"^([A-Za-z0-9][A-Za-z0-9-]*)?\Z")] | None
    ) = None
    creator: str = ""
    max_instance_number: Count | UnsetType = UNSET
    min_instance_number: Count | UnsetType = UNSET
    service_type: Literal["sd"] = "sd"
    workflow_name: str | None = None
    custom_docker_image_uri: str | None = None
    custom_extensions: str | None = None


class DeleteEndpointsBody(Struct, frozen=True, kw_only=True):
    """`username` is ignored: it is who asks. `endpoint_name_list`: ESD profile only."""

    delete_endpoint_list: Annotated[list[Name], Meta(min_length=1, max_length=100)] | None = None
    username: str = ""
    endpoint_name_list: Annotated[list[Name], Meta(min_length=1, max_length=100)] | None = None


class EndpointView(Struct, frozen=True, kw_only=True):
    EndpointDeploymentJobId: str
    autoscaling: bool
    max_instance_number: str
    startTime: str
    status: None
    instance_type: str
    current_instance_count: str
    endTime: str | None
    endpoint_status: str
    endpoint_name: str
    error: str | None
    endpoint_type: str
    owner_group_or_role: list[str]


class InstanceView(Struct, frozen=True, kw_only=True):
    """What a worker said of itself a moment ago. `memory`: bytes taken of its device, of
    `memory_total`; on a CPU by its engine, of the machine's. `models`: what it has loaded. `jobs`:
    what it is doing."""

    instance_id: str
    device: str
    device_name: str
    memory: int
    memory_total: int
    models: list[str]
    jobs: list[str]


class EndpointDetails(Struct, frozen=True, kw_only=True):
    """`instances`: those that are ready or finish their last jobs."""

    endpoint: EndpointView
    min_instance_number: str
    instances: list[InstanceView]


class Endpoints(Struct, frozen=True, kw_only=True):
    endpoints: list[EndpointView]


# Inferences


class CreateInferenceBody(Struct, frozen=True, kw_only=True):
    """`user_id` must be who asks. `models`: type -> names; VAE may be `Automatic` or `None`. What
    is left out and the params name is found when the job is started. `payload_string` (ESD profile
    only): the params inline; the job starts at once."""

    inference_type: InferenceType
    task_type: TaskType
    models: dict[str, Annotated[list[str], Meta(max_length=100)]] = {}
    user_id: str = ""
    filters: dict[str, Any] = {}
    payload_string: str | None = None


class DeleteInferencesBody(Struct, frozen=True, kw_only=True):
    inference_id_list: Annotated[list[Id], Meta(min_length=1, max_length=1000)]


class ModelView(Struct, frozen=True, kw_only=True):
    id: str
    name: list[str]
    type: str


class NewInference(Struct, frozen=True, kw_only=True):
    id: str
    type: str
    api_params_s3_location: str
    api_params_s3_upload_url: str
    models: list[ModelView]


class CreatedInference(Struct, frozen=True, kw_only=True):
    inference: NewInference


class StartedInferenceView(Struct, frozen=True, kw_only=True):
    inference_id: str
    status: str
    endpoint_name: str | None
    output_path: str


class StartedInference(Struct, frozen=True, kw_only=True):
    inference: StartedInferenceView


class UsedModelView(Struct, frozen=True, kw_only=True):
    s3: str
    id: str
    model_name: str
    type: str


class InferenceParams(Struct, frozen=True, kw_only=True):
    input_body_presign_url: str | None
    used_models: dict[str, list[UsedModelView]]
    input_body_s3: str
    output_path: str
    sagemaker_inference_instance_type: str | None
    sagemaker_inference_endpoint_id: str | None
    sagemaker_inference_endpoint_name: str | None


class InferenceView(Struct, frozen=True, kw_only=True):
    """`error`: why a job failed, or who cancelled it. `warnings`: what was asked for and has no
    effect here. `seconds`: stage -> duration."""

    img_presigned_urls: list[str]
    output_presigned_urls: list[str]
    inference_info_name: str | None
    startTime: str | None
    taskType: str
    completeTime: str | None
    params: InferenceParams
    InferenceJobId: str
    status: str
    inference_type: str
    createTime: str
    image_names: list[str]
    sagemakerRaw: str
    owner_group_or_role: list[str]
    error: str | None
    warnings: list[str]
    seconds: dict[str, float]


class Inferences(Struct, frozen=True, kw_only=True):
    """`last_evaluated_key`: what to send as `exclusive_start_key` for those that follow; null when
    none do."""

    page: int
    per_page: int
    pages: int
    total: int
    inferences: list[InferenceView]
    last_evaluated_key: str | None = None


def count(value: int | str) -> int:
    return int(value)
