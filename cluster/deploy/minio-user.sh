#!/bin/sh
# Make the bucket, and the user that MLflow and Ray's containers have: one that reaches this bucket and nothing else.
# compose.yaml runs it at every start. Environment: MC_HOST_root, MinIO's URL with its root user and password;
# AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY of the user, AWS_ENDPOINT_URL.
set -eu

mc mb --ignore-existing root/raydit
# On standard input, because a command line can be read by every process of the machine.
printf '%s\n%s\n' "$AWS_ACCESS_KEY_ID" "$AWS_SECRET_ACCESS_KEY" | mc admin user add root
mc admin policy create root raydit "$(dirname "$0")/minio-policy.json"
# Attached already, it is an error; what counts is whether the user gets at the bucket, and at nothing else.
mc admin policy attach root raydit --user "$AWS_ACCESS_KEY_ID" || true

export MC_HOST_user="http://$AWS_ACCESS_KEY_ID:$AWS_SECRET_ACCESS_KEY@${AWS_ENDPOINT_URL#http://}"
mc ls user/raydit > /dev/null
if mc admin info user > /dev/null 2>&1; then
    echo "the user $AWS_ACCESS_KEY_ID administers MinIO; give the root user another name" >&2
    exit 1
fi
