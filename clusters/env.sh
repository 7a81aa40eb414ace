# What a cluster is told about its surroundings. Edit before `ray up`; it is copied to every machine. No secrets here.

# Storage that all machines share: checkpoints, exports and model downloads go there. One of
#   a folder that is mounted already:                ACPO_SHARED=/mnt/acpo  and the next one empty
#   an NFS or EFS export, mounted at ACPO_SHARED:    ACPO_NFS=fs-0123456789abcdef0.efs.us-east-1.amazonaws.com:/
export ACPO_SHARED=${ACPO_SHARED:-/mnt/acpo}
export ACPO_NFS=${ACPO_NFS:-}

# Machines with more networks than the cluster's own: the network (or addresses, with commas) that may reach Ray, such as
# 10.0.0.0/24. New connections from elsewhere to ports from 1024 on are refused, by nft. Empty where something else sees
# to that, as a cloud's security group does: Ray's own processes listen on every address.
export ACPO_NETWORK=${ACPO_NETWORK:-}

# MLflow's database and where it keeps images; both may be elsewhere (postgresql://…, s3://…).
export ACPO_MLFLOW_DB=${ACPO_MLFLOW_DB:-sqlite:///$ACPO_SHARED/mlflow.db}
export ACPO_MLFLOW_ARTIFACTS=${ACPO_MLFLOW_ARTIFACTS:-$ACPO_SHARED/mlartifacts}
export ACPO_MLFLOW_PORT=${ACPO_MLFLOW_PORT:-5000}
