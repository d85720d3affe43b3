# Every habit of this project; `just` lists them. Each does its own set-up first, once.

set positional-arguments

python := ".venv/bin/python"

# list the recipes
[private]
default:
    @"{{ just_executable() }}" --list --unsorted

# make .venv and install everything; instant when nothing has changed
setup:
    @sh deploy/local/setup.sh

# start everything and return when it is healthy; safe to repeat
up *ARGS: setup
    @{{ python }} -m deploy.local up "$@"

# stop everything
down: setup
    @{{ python }} -m deploy.local down

# what runs, how much memory it takes and whether it is healthy
status: setup
    @{{ python }} -m deploy.local status

# the end of the logs: `just logs`, `just logs gateway -f`
logs *ARGS: setup
    @{{ python }} -m deploy.local logs "$@"

# one job's timeline, from its events: just trace JOB
trace *ARGS: setup
    @{{ python }} -m deploy.local.trace "$@"

# delete all data and secrets, after asking
reset *ARGS: setup
    @{{ python }} -m deploy.local reset "$@"

# apply the migrations of all services
migrate: setup
    @{{ python }} -m deploy.local migrate

# start everything and make a picture by way of the public API
demo *ARGS: up
    @{{ python }} -m deploy.local.demo "$@"

# bring files on this machine into the registry: just import-checkpoint FILE --type Lora
import-checkpoint *ARGS: setup
    @{{ python }} -m deploy.local.import_checkpoint "$@"

# every test, against real servers; arguments go to pytest
test *ARGS: setup
    @{{ python }} -m pytest "$@"

# lint, format, types, who may import whom, and whether the documents are true
check: setup
    .venv/bin/ruff check .
    .venv/bin/ruff format --check .
    {{ python }} -m mypy
    .venv/bin/lint-imports
    {{ python }} -m tests.architecture.docs

# write the documents that are made from the code: docs/asyncapi.json, docs/events.md
docs: setup
    @{{ python }} -m deploy.docs

# format the code
format: setup
    .venv/bin/ruff check --fix .
    .venv/bin/ruff format .

# measure; see tests/bench
bench *ARGS: setup
    @{{ python }} -m tests.bench "$@"

# plot how endpoints scale under three loads, beside a fixed pool; see tests/bench/autoscaling.py
simulate-autoscaling *ARGS: setup
    @{{ python }} -m tests.bench.autoscaling "$@"

# measure the engine on a GPU: `just bench-gpu`, or `just bench-gpu --small` anywhere
bench-gpu *ARGS: setup
    @{{ python }} -m tests.bench.gpu "$@"

# In containers, see docs/operations.md. COMPOSE_PROFILES is cpu or gpu; COMPOSE_FILE takes overrides

export COMPOSE_FILE := env("COMPOSE_FILE", "deploy/compose.yaml")
export COMPOSE_PROFILES := env("COMPOSE_PROFILES", "cpu")
export DARKROOM_COMPOSE_HOME := absolute_path(env("DARKROOM_COMPOSE_HOME", ".darkroom-compose"))

# build the images, make the secrets, start everything and return when it is healthy
compose-up: compose-secrets
    docker compose build
    docker compose up --wait --wait-timeout 300
    # Its users may be allowed other subjects by now; nothing but a signal makes it read them.
    docker compose ps --services | grep '^nats' | xargs docker compose kill --signal HUP

# make the secrets that are missing, and the files of this version
compose-secrets:
    mkdir -p "$DARKROOM_COMPOSE_HOME"
    docker compose build provision
    docker compose run --rm --no-deps --user "$(id -u):$(id -g)" install

# stop the containers; data stays in their volumes
compose-down:
    # Containers that endpoints has started, if it starts some: compose.docker.yaml
    docker ps --quiet --filter "label=darkroom.installation=${COMPOSE_PROJECT_NAME:-darkroom}" \
        | xargs -r docker rm --force
    docker compose down --timeout 30

# the demo's client against the containers
compose-demo: setup
    DARKROOM_HOME="$DARKROOM_COMPOSE_HOME" {{ python }} -m deploy.local.demo

# streams, database and objects into a folder, while everything runs: just backup FOLDER
backup FOLDER:
    #!/bin/sh
    set -eu
    mkdir -p "$1" && chmod 700 "$1"
    folder=$(cd "$1" && pwd)
    tool() {
        docker compose run --rm --no-deps -T --user "$(id -u):$(id -g)" \
            --volume "$folder:/backup" provision python -m deploy.containers.backup "$1" /backup
    }
    tool save-streams
    docker compose exec -T postgres pg_dump -U postgres -Fc darkroom >"$folder/postgres.dump"
    tool save-objects

# what a backup holds takes the place of what is there: just restore FOLDER
restore FOLDER: compose-secrets
    #!/bin/sh
    set -eu
    folder=$(cd "$1" && pwd)
    tool() {
        docker compose run --rm --no-deps -T --user "$(id -u):$(id -g)" \
            --volume "$folder:/backup:ro" provision python -m deploy.containers.backup "$1" /backup
    }
    tool check
    {{ just_executable() }} compose-down
    docker compose run --rm -T provision  # starts the servers first
    docker compose exec -T postgres dropdb -U postgres --force darkroom
    docker compose exec -T postgres pg_restore -U postgres -d postgres --create --exit-on-error \
        <"$folder/postgres.dump"
    # Gateways then believe that they have missed something, and ask all services for their state.
    docker compose exec -T postgres psql -U postgres -d darkroom -q \
        -c 'UPDATE gateway.position SET seq = 9007199254740991'
    tool load-streams
    tool load-objects
    docker compose up --wait --wait-timeout 300
