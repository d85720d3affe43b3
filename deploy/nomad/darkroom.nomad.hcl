# Darkroom's processes as one job of Nomad; docs/operations.md says what goes before it.
#
# NATS, Postgres and S3 are elsewhere: their addresses are variables. What a process must know and
# nobody else may is a Nomad variable that only its group can read, nomad/jobs/darkroom/GROUP, with
# one item `env`. Workers are jobs of their own, which endpoints submits and removes: how many there
# are is its business, so nothing is scaled here.

variable "datacenters" {
  type    = list(string)
  default = ["*"]
}

variable "image" {
  type    = string
  default = "darkroom/service:latest"
}

variable "nats_url" {
  type        = string
  description = "nats://HOST:4222; of a cluster all, separated by commas"
}

variable "s3_url" {
  type        = string
  description = "as processes and workers reach the object store"
}

variable "s3_public_url" {
  type        = string
  description = "as clients reach it: what presigned URLs carry"
}

variable "nomad_addr" {
  type        = string
  description = "as endpoints reaches Nomad"
}

variable "installation" {
  type        = string
  default     = "main"
  description = "tells the workers of this Darkroom from those of another; never change it"
}

variable "instance_types" {
  type        = string
  description = "JSON, see README.md. Constraints put a type on the nodes that have its GPUs."
  default     = <<-JSON
    {"gpu": {"device": "cuda", "gpus": 1, "memory": "32 GiB", "max": 8,
             "image": "darkroom/worker-cuda:latest",
             "nomad": {"gpu_memory": "20 GiB", "cpu": 4000,
                       "constraints": [{"LTarget": "$${attr.kernel.name}", "Operand": "=",
                                        "RTarget": "linux"}]}},
     "cpu": {"device": "cpu", "memory": "8 GiB", "max": 4,
             "image": "darkroom/worker-cpu:latest", "nomad": {"cpu": 4000}}}
    JSON
}

job "darkroom" {
  datacenters = var.datacenters
  type        = "service"

  # A new version must be ready before an old one goes, and if it never is, the old one stays.
  update {
    max_parallel      = 1
    health_check      = "checks"
    min_healthy_time  = "10s"
    healthy_deadline  = "3m"
    progress_deadline = "10m"
    auto_revert       = true
  }

  group "gateway" {
    count = 2

    # One gateway of the new version first, beside all of the old one.
    update {
      canary       = 1
      auto_promote = true
    }

    spread {
      attribute = "${node.unique.id}"
    }

    network {
      port "http" {
        to = 8600
      }
      port "metrics" {
        to = 8601
      }
    }

    service {
      provider = "nomad"
      name     = "darkroom-gateway"
      port     = "http"
      check {
        type     = "http"
        path     = "/readyz"
        interval = "5s"
        timeout  = "4s"
      }
    }

    service {
      provider = "nomad"
      name     = "darkroom-gateway-metrics"
      port     = "metrics"
    }

    task "gateway" {
      driver       = "docker"
      kill_timeout = "20s"
      config {
        image           = var.image
        command         = "python"
        args            = ["-m", "services.gateway"]
        ports           = ["http", "metrics"]
        init            = true
        readonly_rootfs = true
        cap_drop        = ["all"]
      }
      env {
        DARKROOM_SECRETS       = "${NOMAD_SECRETS_DIR}/env"
        DARKROOM_NATS_URL      = var.nats_url
        DARKROOM_S3_URL        = var.s3_url
        DARKROOM_S3_PUBLIC_URL = var.s3_public_url
        DARKROOM_METRICS_PORT  = "8601"
      }
      template {
        destination = "${NOMAD_SECRETS_DIR}/env"
        change_mode = "restart"
        data        = "{{ with nomadVar \"nomad/jobs/darkroom/gateway\" }}{{ .env }}{{ end }}"
      }
      resources {
        cpu    = 500
        memory = 512
      }
    }
  }

  group "identity" {
    count = 2

    spread {
      attribute = "${node.unique.id}"
    }

    network {
      port "http" {
        to = 8600
      }
    }

    service {
      provider = "nomad"
      name     = "darkroom-identity"
      port     = "http"
      check {
        type     = "http"
        path     = "/readyz"
        interval = "5s"
        timeout  = "4s"
      }
    }

    task "identity" {
      driver       = "docker"
      kill_timeout = "20s"
      config {
        image           = var.image
        command         = "python"
        args            = ["-m", "services.identity"]
        ports           = ["http"]
        init            = true
        readonly_rootfs = true
        cap_drop        = ["all"]
      }
      env {
        DARKROOM_SECRETS  = "${NOMAD_SECRETS_DIR}/env"
        DARKROOM_NATS_URL = var.nats_url
      }
      template {
        destination = "${NOMAD_SECRETS_DIR}/env"
        change_mode = "restart"
        data        = "{{ with nomadVar \"nomad/jobs/darkroom/identity\" }}{{ .env }}{{ end }}"
      }
      resources {
        cpu    = 500
        memory = 512
      }
    }
  }

  group "models" {
    count = 2

    spread {
      attribute = "${node.unique.id}"
    }

    network {
      port "http" {
        to = 8600
      }
    }

    service {
      provider = "nomad"
      name     = "darkroom-models"
      port     = "http"
      check {
        type     = "http"
        path     = "/readyz"
        interval = "5s"
        timeout  = "4s"
      }
    }

    task "models" {
      driver       = "docker"
      kill_timeout = "20s"
      config {
        image           = var.image
        command         = "python"
        args            = ["-m", "services.models"]
        ports           = ["http"]
        init            = true
        readonly_rootfs = true
        cap_drop        = ["all"]
      }
      env {
        DARKROOM_SECRETS  = "${NOMAD_SECRETS_DIR}/env"
        DARKROOM_NATS_URL = var.nats_url
        DARKROOM_S3_URL   = var.s3_url
      }
      template {
        destination = "${NOMAD_SECRETS_DIR}/env"
        change_mode = "restart"
        data        = "{{ with nomadVar \"nomad/jobs/darkroom/models\" }}{{ .env }}{{ end }}"
      }
      resources {
        cpu    = 500
        memory = 512
      }
    }
  }

  group "inference" {
    count = 2

    spread {
      attribute = "${node.unique.id}"
    }

    network {
      port "http" {
        to = 8600
      }
    }

    service {
      provider = "nomad"
      name     = "darkroom-inference"
      port     = "http"
      check {
        type     = "http"
        path     = "/readyz"
        interval = "5s"
        timeout  = "4s"
      }
    }

    task "inference" {
      driver       = "docker"
      kill_timeout = "20s"
      config {
        image           = var.image
        command         = "python"
        args            = ["-m", "services.inference"]
        ports           = ["http"]
        init            = true
        readonly_rootfs = true
        cap_drop        = ["all"]
      }
      env {
        DARKROOM_SECRETS  = "${NOMAD_SECRETS_DIR}/env"
        DARKROOM_NATS_URL = var.nats_url
        DARKROOM_S3_URL   = var.s3_url
      }
      template {
        destination = "${NOMAD_SECRETS_DIR}/env"
        change_mode = "restart"
        data        = "{{ with nomadVar \"nomad/jobs/darkroom/inference\" }}{{ .env }}{{ end }}"
      }
      resources {
        cpu    = 500
        memory = 512
      }
    }
  }

  # One has the lead, and is replaced within seconds; workers go on while it is away.
  group "endpoints" {
    count = 1

    network {
      port "http" {
        to = 8600
      }
    }

    service {
      provider = "nomad"
      name     = "darkroom-endpoints"
      port     = "http"
      check {
        type     = "http"
        path     = "/readyz"
        interval = "5s"
        timeout  = "4s"
      }
    }

    task "endpoints" {
      driver       = "docker"
      kill_timeout = "20s"
      # A token for Nomad itself, with what endpoints.policy.hcl allows.
      identity {
        file = true
      }
      config {
        image           = var.image
        command         = "python"
        args            = ["-m", "services.endpoints"]
        ports           = ["http"]
        init            = true
        readonly_rootfs = true
        cap_drop        = ["all"]
      }
      env {
        DARKROOM_SECRETS               = "${NOMAD_SECRETS_DIR}/env"
        DARKROOM_NATS_URL              = var.nats_url
        DARKROOM_S3_URL                = var.s3_url
        DARKROOM_LAUNCHER              = "nomad"
        DARKROOM_INSTALLATION          = var.installation
        DARKROOM_INSTANCE_TYPES        = var.instance_types
        DARKROOM_DEFAULT_INSTANCE_TYPE = "gpu"
        DARKROOM_WORKER_CACHE          = "darkroom-cache"
        DARKROOM_NOMAD_ADDR            = var.nomad_addr
        DARKROOM_NOMAD_TOKEN_FILE      = "${NOMAD_SECRETS_DIR}/nomad_token"
      }
      template {
        destination = "${NOMAD_SECRETS_DIR}/env"
        change_mode = "restart"
        data        = "{{ with nomadVar \"nomad/jobs/darkroom/endpoints\" }}{{ .env }}{{ end }}"
      }
      resources {
        cpu    = 500
        memory = 512
      }
    }
  }
}
