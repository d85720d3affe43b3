import sys

from services.inference.worker.app import build
from services.inference.worker.settings import Settings
from shared.settings import ObjectSettings, load

sys.exit(build(load(Settings), load(ObjectSettings)).run())
