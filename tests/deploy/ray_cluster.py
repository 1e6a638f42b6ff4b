"""`python -m tests.deploy.ray_cluster 1 1 2`: a Ray cluster of nodes with so many CPUs, until stdin ends."""

from __future__ import annotations

import os
import sys

# Before Ray is imported: its ports on the loopback address alone, and nothing sent to anybody.
SETTINGS = {
    "RAY_worker_niceness": "0",  # by default 15: beside other tests engines would get a thirtieth of a core
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
}


def main() -> None:
    """Start the nodes, print the address, wait, and end them."""
    os.environ.update(SETTINGS)
    from ray.cluster_utils import Cluster

    node = {"node_ip_address": "127.0.0.1", "include_dashboard": False, "object_store_memory": 80 * 1024**2}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **node})
    for num_cpus in sys.argv[1:]:
        cluster.add_node(num_cpus=int(num_cpus), wait=False, **node)
    cluster.wait_for_nodes()
    print(f"address {cluster.address}", flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
