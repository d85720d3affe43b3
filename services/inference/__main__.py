from services.inference.app import build
from services.inference.settings import Settings
from shared.settings import ObjectSettings, load

build(load(Settings), load(ObjectSettings)).run()
