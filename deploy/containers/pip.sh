#!/bin/sh
# pip.sh ARGUMENTS…: installs into /opt/darkroom, with what the build was told about pip.
set -eu
[ ! -s /run/secrets/pip_conf ] || export PIP_CONFIG_FILE=/run/secrets/pip_conf
[ ! -s /run/secrets/ca ] || export PIP_CERT=/run/secrets/ca
exec /opt/darkroom/bin/python -m pip install --disable-pip-version-check --progress-bar off \
    --constraint constraints.txt "$@"
