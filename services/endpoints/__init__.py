"""endpoints: pools of workers, and the processes behind them.

Owns        schema `endpoints`: endpoints, instances; the JOBS consumer of each endpoint;
            the workers: processes with their records under `<run>/workers/`, containers, or
            jobs of Nomad with their variables
Accepts     endpoints.create_endpoint, delete_endpoints, report_instance (workers only), resync
Emits       endpoints.endpoint_*
Listens to  no foreign event; `reactions.py` follows the workers, their beats and their queues
"""
