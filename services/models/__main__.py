from services.models.app import build
from services.models.settings import Settings
from shared.settings import load

build(load(Settings)).run()
