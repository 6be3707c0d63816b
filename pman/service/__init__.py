"""pman over HTTP: the contract that pfcon relies on, pages for people, metrics, and the server.

The contract is in api.py and may not change. What is done with every request (authentication, limits, errors, the log)
is in app.py, and a page is in pages.py and html/.
"""
