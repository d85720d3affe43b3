from services.endpoints.app import build
from services.endpoints.settings import Settings
from shared.settings import load

build(load(Settings)).run()
