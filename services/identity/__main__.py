from services.identity.app import build
from services.identity.settings import Settings
from shared.settings import load

build(load(Settings)).run()
