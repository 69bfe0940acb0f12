# Keeps a compiled lock portable: torch without hashes, its CUDA packages left to the torch build that needs them.
/^[a-z]/ { skip = /^(nvidia-|cuda-|triton==)/; if (/^torch==/) { print $1; skip = 1 } }
!skip
