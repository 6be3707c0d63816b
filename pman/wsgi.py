"""`application` for any WSGI server, such as `gunicorn --bind 0.0.0.0:5010 --threads 40 pman.wsgi:application`."""

import sys

from pman import settings
from pman.errors import PmanError
from pman.service import app

try:
    # The server was told where to listen, and pman was not: others may reach it.
    application = app.start(settings.load({"LISTEN_ADDRESS": "::"}))
except PmanError as error:
    print(f"Error: {error}", file=sys.stderr)
    # At this status gunicorn ends (APP_LOAD_ERROR in gunicorn/arbiter.py); at others it would try again for ever.
    sys.exit(4)
