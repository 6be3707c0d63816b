"""Job and site to text: a job goes through the shipped templates and the site's, and every value comes out quoted.

Nothing here knows a scheduler: what is particular to one is said in pman/targets/ and in the templates. Change quote.py
for how a language is written, sandbox.py for what a template may do, site.py for how site.yaml is read.
"""
