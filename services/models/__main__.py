from services.models.app import build
from services.models.settings import Settings
from shared.settings import ObjectSettings, load

build(load(Settings), load(ObjectSettings)).run()
