"""The fault campaign: every row of the fault table as one function.

``tools/fault_campaign.py`` runs the rows from a checkout, ``tests/campaign`` runs their column
for continuous integration.  Nothing here is installed with the package.
"""
