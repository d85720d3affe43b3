# Roles, schemas, migrations, streams and buckets: to be run before the first start and before each
# upgrade, while the version before still serves. It ends when they are as declared.

variable "datacenters" {
  type    = list(string)
  default = ["*"]
}

variable "image" {
  type    = string
  default = "darkroom/service:latest"
}

variable "nats_url" {
  type = string
}

variable "s3_url" {
  type = string
}

variable "postgres" {
  type        = string
  description = "HOST:PORT"
}

variable "stream_replicas" {
  type        = number
  default     = 3
  description = "how many servers of the NATS cluster keep each stream; 1 for a single one"
}

job "darkroom-provision" {
  datacenters = var.datacenters
  type        = "batch"

  group "provision" {
    reschedule {
      attempts  = 0
      unlimited = false
    }
    restart {
      attempts = 2
      mode     = "fail"
    }

    task "provision" {
      driver = "docker"
      config {
        image           = var.image
        command         = "python"
        args            = ["-m", "deploy.containers.provision"]
        readonly_rootfs = true
        cap_drop        = ["all"]
      }
      env {
        DARKROOM_INSTALLATION_FILE = "${NOMAD_SECRETS_DIR}/installation"
        DARKROOM_NATS_URL          = var.nats_url
        DARKROOM_S3_URL            = var.s3_url
        DARKROOM_POSTGRES          = var.postgres
        DARKROOM_STREAM_REPLICAS   = var.stream_replicas
      }
      template {
        destination = "${NOMAD_SECRETS_DIR}/installation"
        data        = "{{ with nomadVar \"nomad/jobs/darkroom-provision\" }}{{ .installation }}{{ end }}"
      }
      resources {
        cpu    = 500
        memory = 256
      }
    }
  }
}
