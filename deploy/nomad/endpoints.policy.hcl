# What endpoints may do in Nomad: run workers, and put what they must know where only they read it.
#
#   nomad acl policy apply -namespace default -job darkroom -group endpoints \
#       darkroom-endpoints deploy/nomad/endpoints.policy.hcl

namespace "default" {
  capabilities = ["submit-job", "read-job", "list-jobs", "read-logs", "alloc-lifecycle"]

  # Those of its workers: darkroom-INSTALLATION-INSTANCE.
  variables {
    path "nomad/jobs/darkroom-main-*" {
      capabilities = ["write", "read", "list", "destroy"]
    }
  }
}
