"""inference: the job ledger. The GPU process that does the jobs is in `worker/`.

Owns        schema `inference`: jobs, leftovers; copies of foreign state: checkpoints, endpoints
Accepts     inference.create_job, start_job, cancel_job, delete_jobs, resync, and from the workers
            report_job_started, report_job_succeeded, report_job_failed
Emits       inference.job_*, and inference.run_job on the queue of an endpoint
Listens to  models.checkpoint_*, endpoints.endpoint_*
"""
