"""transformers' own modelling tests, run on this package; see ../upstream_tests.py.

=============  =====================================================================
fetch          the tests: a source distribution by pip, its hash checked, unpacked
families       the tiny models, one literal each
cases          what pytest collects: their test class for one family
plugin         inside pytest: ours in the place of sdpa, the outcomes written down
differences    known failures and the reason for each
judge          outcomes to a verdict
=============  =====================================================================
"""
