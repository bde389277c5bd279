"""The kernels. Each is one folder `kernels/<op>/` of the repository, installed as `wandapp.kernels.<op>`.

`FUNCTIONS` maps every public function to its folder; `dispatch` chooses the backend that runs it.
"""

FUNCTIONS = {
    "column_sumsq": "column_sumsq",
    "select_nm": "select",
    "select_rows": "select",
    "prune_nm_": "select",
    "prune_rows_": "select",
    "prune_pack_nm_": "select",
    "compensate_block_": "compensate",
    "pack": "pack",
    "unpack": "pack",
    "sparse_linear": "sparse_linear",
    "rmsprop_": "rmsprop",
    "pairwise_max_sum": "max_sum",
}
