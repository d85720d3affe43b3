from services.gateway.app import run
from services.gateway.settings import Settings
from shared.settings import ObjectSettings, load

run(load(Settings), load(ObjectSettings))
