"""A Ray cluster of two nodes on this machine's loopback, in a process of its own: `python -m tests.hosts.ray_cluster`.

stdout   its address, then an answer in JSON to each line of stdin: the placement groups there are
stdin    its end is the cluster's
"""

from __future__ import annotations

import json
import os
import sys

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing leaves this machine
    "RAY_worker_niceness": "0",  # by default 15: beside other tests followers would get a thirtieth of a core
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # and nothing its loopback: Ray takes this for "no other machines"
}
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False, "node_ip_address": "127.0.0.1"}


def main() -> None:
    os.environ.update(ENVIRONMENT)
    import ray
    from ray.cluster_utils import Cluster
    from ray.util import placement_group_table

    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    try:
        cluster.add_node(**NODE)
        print(cluster.address, flush=True)
        for _ in sys.stdin:
            ray.init(address=cluster.address, log_to_driver=False, logging_level="error", ignore_reinit_error=True)
            print(json.dumps(list(placement_group_table().values())), flush=True)
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
