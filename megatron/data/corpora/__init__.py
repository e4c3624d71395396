"""Where text comes from: domains made from this machine's Python, and named public corpora.

``quickstart`` builds its domains without a network; ``public`` names corpora that are
fetched.  Both end as token files that a configuration names as domains.
"""
